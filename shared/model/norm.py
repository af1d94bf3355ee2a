"""RMSNorm for Megatron-Core's layer specs, with or without sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich, 2019).

    The order of roundings is that of transformers' LLaMA: the quotient in fp32, rounded to the input's type, then
    multiplied by the weight. Megatron-Core's own torch norm refuses sequence parallelism; this one marks its
    weight so that Megatron-Core sums its gradient over the tensor-parallel processes.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and type."""
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_float * scale).to(x.dtype)


class CheckpointedRMSNorm(RMSNorm):
    """A norm that is a checkpoint entry of its own: the final norm, and those of queries and keys.

    TransformerEngine's norms keep an `_extra_state`, and loaders with its layer spec insist on finding one. The
    norms in front of linear layers are entries of those layers, which write it.
    """

    def get_extra_state(self) -> None:
        """Nothing, as TransformerEngine saves outside FP8."""
        return None

    def set_extra_state(self, state: object) -> None:
        """There is nothing to set."""
