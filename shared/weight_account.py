"""Accounts for every tensor of a Hugging Face directory from the file headers, before anything is loaded.

transformers and vLLM initialise missing tensors randomly and continue; transformers drops tensors that its class ignores.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.hugging_face import HfReader
from shared.errors import UserError
from shared.families import registry
from shared.families.common.mtp import mtp_part
from shared.mapping.account import account_sources
from shared.mapping.layout import Shape
from shared.mapping.rule import Table

# Buffers of old files that transformers' loader ignores for every class.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def account_for_weights(source: Path, place: str) -> bool:
    """Compare a directory's tensors with its family's table, or with the transformers class that config.json names.

    The class decides for an unknown family, for a class that is not the family's (a reward model), and for a known family in
    another layout that the class can load.

    Args:
        source: a Hugging Face directory.
        place: flag and path, for errors.

    Returns:
        whether the tensors are accounted for; False if neither a table nor a class that accepts the configuration is known.

    Raises:
        UserError: a tensor is missing, unknown or misshapen; the message names it.
    """
    reader = HfReader(source, place.split(" ", maxsplit=1)[0])
    refusal: UserError | None = None
    table = _table(source, reader)
    if table is not None and _names_a_class_of_its_family(reader.config):
        try:
            account_sources(table, reader.weights, place)
        except UserError as error:
            if not _another_layout(table, reader.weights):
                raise
            refusal = error
        else:
            return True
    kind = transformers_class(reader.config)
    if kind is None or "quantization_config" in reader.config:
        if refusal is not None:
            raise refusal
        return False
    problem = _problem_of_class(kind, source, _shapes(reader), _further_names(table, reader))
    if problem or (refusal is not None and problem is None):
        raise refusal or UserError(f"{place}: {problem}")
    return problem is not None


def tensors_aside(source: Path, place: str, *classes: Any) -> tuple[str, ...]:
    """Tensors of a directory that none of the transformers classes holds, sorted: MTP layers, buffers of old files.

    Training changes none of them; they are published as they are.

    Args:
        source: a directory that `account_for_weights` has accepted.
        place: flag and path, for errors.
        classes: transformers classes that load it.

    Raises:
        UserError: a class rejects the configuration or the tensors.
    """
    shapes = _shapes(HfReader(source))
    aside = set(shapes)
    for kind in classes:
        load = _on_meta(kind, source, shapes)
        if load.model is None:
            why = load.rejection or "its tensors are not those of config.json"
            raise UserError(f"{place}: {kind.__name__} of transformers does not load it: {why}")
        aside -= load.held
    return tuple(sorted(aside))


def tied_copies(source: Path) -> dict[str, str]:
    """Stored tensors that duplicate another tensor by the family's table: name -> name of the other. Empty without a table."""
    reader = HfReader(source)
    table = _table(source, reader)
    if table is None:
        return {}
    tied = table.with_names_of(reader.weights).tied_tensors
    return {each.name: each.tied_to for each in tied if each.name in reader.weights}


def transformers_class(config: Mapping[str, Any]) -> Any:
    """The class that config.json names; without `architectures`, its model type's causal language model; None if unknown."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = config.get("architectures") or [CAUSAL.get(config.get("model_type", ""), "")]
    kind = getattr(transformers, names[0], None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _table(source: Path, reader: HfReader) -> Table | None:
    """The table of the directory's family; of a reward model, that of its language model. None without one."""
    language_model: dict[str, Any] = {} if _names_a_class_of_its_family(reader.config) else {"architectures": None}
    architecture: Architecture | None = None
    with contextlib.suppress(UserError):  # an unknown family or field
        architecture = registry.from_files(source, **language_model)
        architecture = registry.drop_missing_mtp(architecture, reader.weights)
    return None if architecture is None else registry.table_of(architecture)


def _names_a_class_of_its_family(config: Mapping[str, Any]) -> bool:
    try:
        registry.family_of(config)
    except UserError:
        return False
    return True


def _shapes(reader: HfReader) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in reader.tensors.items()}


def _further_names(table: Table | None, reader: HfReader) -> set[str]:
    """Tensors that a family has beside those of its class: MTP layers, pass-through tensors."""
    if table is None:
        return set()
    table = table.with_names_of(reader.tensors)
    mtp = {source.name for entry in mtp_part(table).entries() for source in entry.sources}
    return mtp | {tied.name for tied in table.tied_tensors if tied.always} | table.pass_through_names()


def _another_layout(table: Table, found: Collection[str]) -> bool:
    """Whether tensors are both missing and unknown, e.g. experts stacked into one tensor."""
    wanted = {source.name for entry in table.with_names_of(found).entries() for source in entry.sources}
    known = wanted | {tied.name for tied in table.tied_tensors} | table.pass_through_names()
    return bool(wanted - set(found)) and bool(set(found) - known)


@dataclass(frozen=True, kw_only=True)
class _Load:
    """What transformers makes of a directory's names and shapes."""

    model: Any
    """On the meta device; None if the class rejects the configuration or the tensors do not stack into its own."""
    rejection: str = ""
    """The class's reason to reject the configuration."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Missing and unexpected names, in the class's spelling; names with stored and wanted shape."""
    held: frozenset[str] = frozenset()
    """Stored names that the class loads."""
    unfit: bool = False
    """Tensors do not stack into those of the class."""


class _StoredTensor:
    """A tensor on the meta device that notes that it is read, as transformers reads a slice of a safetensors file."""

    def __init__(self, name: str, shape: Shape, read: set[str]) -> None:
        self._name, self._shape, self._read = name, shape, read

    def __getitem__(self, index: Any) -> Any:
        import torch

        self._read.add(self._name)
        return torch.empty(self._shape, device="meta")[index]


def _on_meta(kind: Any, source: Path, shapes: Mapping[str, Shape]) -> _Load:
    """Load names and shapes into a class on the meta device: no file is read, no memory is used."""
    import torch

    held: set[str] = set()
    stored = {name: _StoredTensor(name, shape, held) for name, shape in shapes.items()}
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                None,
                config=kind.config_class.from_pretrained(source, local_files_only=True),
                state_dict=stored,
                dtype=torch.float32,
                device_map={"": torch.device("meta")},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError:
        return _Load(model=None, unfit=True)
    except (ValueError, OSError, ImportError, KeyError, AttributeError) as error:
        return _Load(model=None, rejection=(str(error).splitlines() or [type(error).__name__])[0])
    return _Load(model=model, info=info, held=frozenset(held))


def _problem_of_class(kind: Any, source: Path, shapes: Mapping[str, Shape], further: Collection[str]) -> str | None:
    """Problem that transformers finds with the tensors; "" if none, None if the class rejects the configuration.

    `further`: names that the class need not hold.
    """
    load = _on_meta(kind, source, shapes)
    asks = f"though its class {kind.__name__} asks for it; fetch the model again"
    if load.unfit:
        return f"{_first_difference(kind, source, shapes)}, {asks}"
    if load.model is None:
        return None  # who loads it reports that
    tied = load.model.all_tied_weights_keys  # of a missing pair both are missing: the embedding is the one to be stored
    if missing := sorted({tied.get(name, name) for name in load.info["missing_keys"]}):
        return f"{_some(missing)} missing, {asks}"
    if load.info["unexpected_keys"]:
        ignored = re.compile(
            "|".join(f"({p})" for p in (*load.model._keys_to_ignore_on_load_unexpected, *_OLD_BUFFERS))
        )
        unknown = sorted(n for n in shapes.keys() - load.held - set(further) if not ignored.search(n))
        if unknown:
            return f"{_some(unknown)} unknown to its class {kind.__name__}; remove it, or correct config.json"
    for name, stored, wanted in sorted(load.info["mismatched_keys"]):
        return f"{name} is {list(stored)}, config.json asks for {list(wanted)}"
    return ""


def _first_difference(kind: Any, source: Path, shapes: Mapping[str, Shape]) -> str:
    """The first tensor that differs from those that transformers would save, for experts that do not stack."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with _quiet(), torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(source, local_files_only=True))
    wanted = revert_weight_conversion(model, model.state_dict())
    for name in sorted(wanted):
        if name in shapes and shapes[name] != tuple(wanted[name].shape):
            return f"{name} is {list(shapes[name])} and not {list(wanted[name].shape)}"
    missing = sorted(wanted.keys() - shapes.keys() - model.all_tied_weights_keys.keys())
    return f"{_some(missing)} missing" if missing else "its tensors do not stack into one"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of several lines, its progress bar and warnings."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
