"""Workarounds of transformers: what its classes do not compute of a configuration that they load."""

from __future__ import annotations

from functools import partial
from typing import Any


def with_workarounds(model: Any) -> Any:
    """The model of transformers, computing what its configuration says: MPT's `alibi_bias_max`, which its class leaves at 8.

    Args:
        model: of any family, with a head or without.
    """
    if model.config.model_type == "mpt":
        body, attention = model.base_model, model.config.attn_config
        body.build_mpt_alibi_tensor = partial(body.build_mpt_alibi_tensor, alibi_bias_max=attention.alibi_bias_max)
    return model
