"""The modelling code that a checkpoint directory brings along, and which a user may ask to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of the classes that such code is registered under, in the order in which they are looked for: older families register
# their language model as the plain model.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def remote_class(config: Mapping[str, Any]) -> str | None:
    """The transformers auto class that the directory's own language model is registered under; None if there is none."""
    registered = config.get("auto_map") or {}
    return next((name for name in _AUTO_CLASSES if name in registered), None)
