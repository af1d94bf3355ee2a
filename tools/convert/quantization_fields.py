"""Quantisation fields of config.json. Over plain weights they make loaders look for codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers; compressed-tensors' first releases; ChatGLM; GLM-130B
_FIELDS = ("quantization_config", "compression_config", "quantization_bit", "quantization_bit_width")


def without_quantization(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json for plain weights, and the names of the fields left out, in `text_config` and other parts, too."""
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in config.items():
        if name in _FIELDS:
            left_out += [name] if value else []  # null and 0 promise nothing
        elif isinstance(value, dict):
            kept[name], inside = without_quantization(value)
            left_out += [f"{name}.{field}" for field in inside]
        else:
            kept[name] = value
    return kept, left_out
