"""Checks tensor names and shapes from the file headers, before an engine loads weights.

vLLM and transformers initialise missing tensors randomly and continue.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.hugging_face import HfReader
from shared.console import log
from shared.errors import UserError
from shared.families import registry
from shared.mapping.account import account_sources
from shared.mapping.rule import Table


def account_for_weights(source: Path) -> None:
    """Compare a Hugging Face directory with its family's tensor table or with its transformers class.

    The transformers class decides for an unknown family, and for a known family in another layout that the class can load.

    Raises:
        UserError: a tensor is missing, unknown or misshapen; the message names it.
    """
    reader = HfReader(source)
    refusal: UserError | None = None
    architecture: Architecture | None = None
    with contextlib.suppress(UserError):  # an unknown family or field
        architecture = registry.drop_missing_mtp(registry.from_files(source), reader.weights)
    if architecture is not None:
        table = registry.table_of(architecture)
        try:
            account_sources(table, reader.weights, f"--source {source}")
        except UserError as error:
            if not _another_layout(table, reader.weights):
                raise
            refusal = error
        else:
            return
    problem = _problem_of_class(source, reader.config)
    if refusal is not None and problem != "":
        raise refusal
    if problem:
        raise UserError(f"--source {source}: {problem}")
    if problem is None:
        log(f"{source}: no table of its tensors is known here, so the engine alone checks that all are there")


def _another_layout(table: Table, found: Collection[str]) -> bool:
    """Whether tensors are both missing and unknown, e.g. experts stacked into one tensor."""
    wanted = {source.name for entry in table.with_prefixes_of(found).entries() for source in entry.sources}
    known = wanted | {tied.name for tied in table.tied_tensors} | table.pass_through_names()
    return bool(wanted - set(found)) and bool(set(found) - known)


def _problem_of_class(source: Path, config: dict[str, Any]) -> str | None:
    """Problem that transformers finds with the tensors, without loading them; "" if none, None without a class."""
    import torch
    import transformers

    kind = getattr(transformers, next(iter(config.get("architectures") or []), ""), None)
    if kind is None or "quantization_config" in config:
        return None
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            _, info = kind.from_pretrained(
                source,
                local_files_only=True,
                device_map={"": torch.device("meta")},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError:  # experts do not stack into the class's tensor
        return f"its tensors are not those that its class {kind.__name__} is made of; fetch the model again"
    except (ValueError, OSError, ImportError, KeyError, AttributeError):
        return None  # the class rejects the configuration; the engine reports that
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        return f"{_some(missing)} missing, though its class {kind.__name__} asks for it; fetch the model again"
    if unknown := sorted(info["unexpected_keys"]):
        return f"{_some(unknown)} unknown to its class {kind.__name__}; remove it, or correct config.json"
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        return f"{name} is {list(stored)}, config.json asks for {list(wanted)}"
    return ""


def _some(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
