"""Modelling code in a checkpoint directory; run only with --trust-remote-code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In order of preference: older families register their language model as AutoModel.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def remote_class(config: Mapping[str, Any]) -> str | None:
    """The language model's class in auto_map; None without modelling code."""
    registered = config.get("auto_map") or {}
    return next((name for name in _AUTO_CLASSES if name in registered), None)
