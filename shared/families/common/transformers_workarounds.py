"""Workarounds for config.json fields that transformers classes load but do not apply."""

from __future__ import annotations

from functools import partial
from typing import Any


def with_workarounds(model: Any) -> Any:
    """Apply MPT's `alibi_bias_max`, which the transformers class ignores (always 8).

    Args:
        model: a transformers model of any family, with or without head.
    """
    if model.config.model_type == "mpt":
        body, attention = model.base_model, model.config.attn_config
        body.build_mpt_alibi_tensor = partial(body.build_mpt_alibi_tensor, alibi_bias_max=attention.alibi_bias_max)
    return model
