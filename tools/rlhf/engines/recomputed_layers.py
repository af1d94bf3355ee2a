"""`--gradient-checkpointing`: activations of decoder layers are computed again in the backward pass (arXiv:1604.06174).

transformers' own acts in training mode only, and the layers are in evaluation mode here: dropout would make sampler and trainer
different distributions. So each layer's forward pass is wrapped, on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared.errors import UserError

_CACHES = ("past_key_values", "layer_past")


def recompute_layers(model: nn.Module) -> int:
    """Keep of each layer only its input for the backward pass; losses and gradients are the same to the bit.

    Layers are those that transformers itself can recompute; one within another is part of it.

    Returns:
        the number of layers.

    Raises:
        UserError: the model's class has none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    outer = [layer for name, layer in found.items() if not any(name.startswith(f"{other}.") for other in found)]
    if not outer:
        raise UserError(
            f"--gradient-checkpointing: {type(model).__name__} of transformers has no layers that can be recomputed; leave "
            "it out"
        )
    for layer in outer:
        layer.forward = _recomputed(layer.forward)
    return len(outer)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # A second forward pass would append to a cache again; whole sequences are trained on, and their caches not read.
        named |= {name: None for name in _CACHES if name in named} | (
            {"use_cache": False} if "use_cache" in named else {}
        )
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run
