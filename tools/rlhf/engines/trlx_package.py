"""Where trlx is, and its import beside the versions of tools/rlhf/requirements.lock.

trlx is in no package index and its last commit is of January 2024. It is used as it is: what it imports and does not find is
there while it is imported, and gone afterwards, as transformers, peft and accelerate look for wandb and ray, too.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zipfile import BadZipFile, ZipFile

from shared.errors import UserError

VARIABLE = "BATON_TRLX"
COMMIT = "3340c2f3a56d1d14fdd5f13ad575121fa26b6d92"
"""The newest commit, with which this was written and tested."""

_HOW = (
    f"git clone https://github.com/CarperAI/trlx && git -C trlx checkout {COMMIT[:7]}, then set {VARIABLE} to that folder, or to "
    "a wheel of it"
)
_PACKAGE = "trlx/__init__.py"


def locate() -> Path:
    """The checkout or wheel that the environment variable names.

    Raises:
        UserError: the variable is not set, or names something else.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        raise UserError(f"--backend trlx needs trlx, which is in no package index: {_HOW}")
    place = Path(given).expanduser().resolve()
    if not _holds_trlx(place):
        raise UserError(f"{VARIABLE} {given} is no checkout and no wheel of trlx ({_PACKAGE} is not in it): {_HOW}")
    return place


def _holds_trlx(place: Path) -> bool:
    if place.is_dir():
        return (place / _PACKAGE).is_file()
    try:
        with ZipFile(place) as wheel:
            return _PACKAGE in wheel.namelist()
    except (OSError, BadZipFile):
        return False


def import_trlx(place: Path) -> None:
    """Import trlx with its PPO trainer.

    Raises:
        UserError: the code there is no trlx that this works with.
    """
    # Before the stand-ins: these look for wandb and ray as they are imported.
    for name in ("accelerate", "datasets", "deepspeed", "peft", "transformers"):
        importlib.import_module(name)
    try:
        with _stand_ins(), _former_names_of_peft(), _on_the_path(place), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # escapes in its strings
            importlib.import_module("trlx.trainer.accelerate_ppo_trainer")
    except ImportError as error:
        raise UserError(f"{VARIABLE} {place}: {error}; give commit {COMMIT[:7]}: {_HOW}") from error
    from trlx.utils import logging

    logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()


class _TensorType:
    """torchtyping's annotation, which is subscripted and never read."""

    def __class_getitem__(cls, item: Any) -> type:
        return cls


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules for the packages that trlx imports and that PPO without trackers and sweeps does not use.

    A package that is installed is taken instead.
    """
    session = SimpleNamespace(get_checkpoint=lambda: None, report=lambda *args, **kwargs: None)
    content: dict[str, dict[str, Any]] = {
        "ray": {"is_initialized": lambda: False},
        "ray.air": {"session": session},
        "torchtyping": {"TensorType": _TensorType},
        "wandb": {},
    }
    absent = {name for name in ("ray", "torchtyping", "wandb") if find_spec(name) is None}
    added = [name for name in content if name.partition(".")[0] in absent]
    for name in added:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(content[name])
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


@contextmanager
def _former_names_of_peft() -> Iterator[None]:
    """`prepare_model_for_int8_training`, as `prepare_model_for_kbit_training` was called."""
    import peft

    former = "prepare_model_for_int8_training"
    if hasattr(peft, former):
        yield
        return
    setattr(peft, former, peft.prepare_model_for_kbit_training)
    try:
        yield
    finally:
        delattr(peft, former)


@contextmanager
def _on_the_path(place: Path) -> Iterator[None]:
    """The last place of the module path: a checkout has folders named tests and docs, too."""
    sys.path.append(str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
