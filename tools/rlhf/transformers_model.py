"""Models of transformers from a directory, with an account of every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.families.common.transformers_workarounds import with_workarounds


def load_transformers_model(
    auto_class: Any, path: Path, *, flag: str, other_head: bool = False, **arguments: Any
) -> Any:
    """The model, in evaluation mode. transformers fills a tensor that is absent with random numbers; here it is an error.

    Args:
        auto_class: AutoModelForCausalLM or another of the Auto classes.
        path: a Hugging Face directory.
        flag: that names it in errors.
        other_head: the class has another head than the directory's: what lies outside the body may differ.
        arguments: of `from_pretrained`.

    Raises UserError, naming the tensor, if one is missing, unknown or of another shape than the class wants.
    """
    model, info = auto_class.from_pretrained(
        path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )

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
        raise UserError(
            f"{flag} {path}: {found[0]}{others}; give a directory whose weights are those of its config.json"
        )
    return with_workarounds(model).eval()
