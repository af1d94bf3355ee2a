"""Where trlx is looked for, and what is there while it is imported: no trlx is needed."""

import importlib
import sys
from zipfile import ZipFile

import peft
import pytest

from shared.errors import UserError
from tools.rlhf.engines import trlx_package

# What trlx 3340c2f imports and uses at import, under a name of its own.
IMPORTS = """
import ray
import torchtyping
import wandb
from peft import prepare_model_for_int8_training
from ray.air import session
from torchtyping import TensorType

SHAPED = TensorType["batch", "tokens"]
INITIALISED = ray.is_initialized()
"""


def test_without_the_variable_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("BATON_TRLX", raising=False)
    with pytest.raises(UserError) as refused:
        trlx_package.locate()
    assert "\n" not in str(refused.value)
    for word in ("--backend trlx", "BATON_TRLX", "git clone https://github.com/CarperAI/trlx", "3340c2f"):
        assert word in str(refused.value)


def test_a_checkout_and_a_wheel_are_found(monkeypatch, tmp_path):
    (tmp_path / "trlx").mkdir()
    (tmp_path / "trlx/__init__.py").touch()
    wheel = tmp_path / "trlx-0.7.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("trlx/__init__.py", "")
    for place in (tmp_path, wheel):
        monkeypatch.setenv("BATON_TRLX", str(place))
        assert trlx_package.locate() == place


@pytest.mark.parametrize("kind", ["missing", "empty folder", "text", "other wheel"])
def test_what_is_no_trlx_is_refused(monkeypatch, tmp_path, kind):
    place = tmp_path / "place"
    if kind == "empty folder":
        place.mkdir()
    elif kind == "text":
        place.write_text("trlx/__init__.py")
    elif kind == "other wheel":
        with ZipFile(place, "w") as archive:
            archive.writestr("trl/__init__.py", "")
    monkeypatch.setenv("BATON_TRLX", str(place))
    with pytest.raises(UserError, match=f"BATON_TRLX {place} is no checkout and no wheel"):
        trlx_package.locate()


def test_what_trlx_imports_is_there_while_it_is_imported(tmp_path):
    """Afterwards nobody finds it: transformers and accelerate look for wandb, and for ray."""
    (tmp_path / "of_trlx.py").write_text(IMPORTS)
    path = list(sys.path)
    absent = [name for name in ("ray", "torchtyping", "wandb") if importlib.util.find_spec(name) is None]
    assert absent, "the lock has none of them"
    with trlx_package._stand_ins(), trlx_package._former_names_of_peft(), trlx_package._on_the_path(tmp_path):
        assert sys.path[-1] == str(tmp_path)  # a checkout's tests and docs hide no module
        module = importlib.import_module("of_trlx")
    assert module.INITIALISED is False
    assert module.session.get_checkpoint() is None
    assert module.prepare_model_for_int8_training is peft.prepare_model_for_kbit_training
    assert sys.path == path
    assert not hasattr(peft, "prepare_model_for_int8_training")
    assert [name for name in absent if importlib.util.find_spec(name) is not None] == []
    assert "ray.air" not in sys.modules
