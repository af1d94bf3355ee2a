"""Models of transformers from a directory, with an account of every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.families.common.transformers_workarounds import with_workarounds


def load_transformers_model(
    auto_class: Any, path: Path, *, place: str, other_head: bool = False, **arguments: Any
) -> Any:
    """The model, in evaluation mode. transformers initialises missing tensors randomly; here they are an error.

    Args:
        auto_class: AutoModelForCausalLM or another of the Auto classes.
        path: a Hugging Face directory.
        place: flag and path, for errors.
        other_head: the class has a new head: tensors outside the body may be missing or unknown.
        arguments: of `from_pretrained`.

    Raises:
        UserError: a tensor is missing, unknown or misshapen; the message names it.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of several lines, and a warning of the new head
    try:
        model, info = auto_class.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    finally:
        logging.set_verbosity(verbosity)

    def accounted(names: Any) -> list[str]:
        body = f"{model.base_model_prefix}."
        return sorted(name for name in names if name.startswith(body) or not other_head)

    found = [
        *(f"{name} is missing" for name in accounted(info["missing_keys"])),
        *(
            f"{name} has the shape {list(stored)} and {type(model).__name__} wants {list(wanted)}"
            for name, stored, wanted in sorted(info["mismatched_keys"])
        ),
        *(f"{name} is no tensor of {type(model).__name__}" for name in accounted(info["unexpected_keys"])),
    ]
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{place}: {found[0]}{others}; give a directory whose weights are those of its config.json")
    return with_workarounds(model).eval()
