"""Norms for Megatron-Core's layer specs, with or without sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Attention, Norm


class RMSNorm(torch.nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich, 2019).

    The order of roundings is that of transformers' LLaMA: the quotient in fp32, rounded to the input's type, then
    multiplied by the weight. Megatron-Core's own torch norm refuses sequence parallelism; this one marks its
    weight so that Megatron-Core sums its gradient over the tensor-parallel processes.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (hidden_size,), 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and type."""
        return self.weight * self.scaled(x.float()).to(x.dtype)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps)`, fp32."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class RMSNorm1p(RMSNorm):
    """Gemma's: the weight is stored less one, and the product is rounded once."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)
        with torch.no_grad():
            self.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and type."""
        return (self.scaled(x.float()) * (1.0 + self.weight.float())).to(x.dtype)


class PlainLayerNorm(torch.nn.Module):
    """Layer normalisation (Ba et al., 2016) without a bias."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (hidden_size,), 1.0)
        self.bias: torch.nn.Parameter | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and type."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class LayerNorm(PlainLayerNorm):
    """Layer normalisation with a bias."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)
        self.bias = _parameter(config, (hidden_size,), 0.0)


class FixedLayerNorm(torch.nn.Module):
    """Layer normalisation whose weight is one and whose bias is zero for good (Galactica 30B).

    They are buffers: kept in checkpoints, for loaders whose norms have weights, and never trained.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            self.register_buffer(name, _parameter(config, (hidden_size,), value).data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape and type."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Checkpointed(torch.nn.Module):
    """A norm that is a checkpoint entry of its own: the final norm, and those of queries and keys.

    TransformerEngine's norms keep an `_extra_state`, and loaders with its layer spec insist on finding one. The
    norms in front of linear layers are entries of those layers, which write it.
    """

    def get_extra_state(self) -> None:
        """Nothing, as TransformerEngine saves outside FP8."""
        return None

    def set_extra_state(self, state: object) -> None:
        """There is nothing to set."""


class CheckpointedRMSNorm(_Checkpointed, RMSNorm):
    """An RMSNorm that is a checkpoint entry of its own."""


class CheckpointedRMSNorm1p(_Checkpointed, RMSNorm1p):
    """Gemma's norm as a checkpoint entry of its own."""


class CheckpointedPlainLayerNorm(_Checkpointed, PlainLayerNorm):
    """A layer norm without bias that is a checkpoint entry of its own."""


class CheckpointedLayerNorm(_Checkpointed, LayerNorm):
    """A layer norm that is a checkpoint entry of its own."""


class CheckpointedFixedLayerNorm(_Checkpointed, FixedLayerNorm):
    """A layer norm without weights that is a checkpoint entry of its own."""


class ProjectionRMSNorm(_Checkpointed):
    """RMSNorm over all heads of a projection (OLMo 2), which tensor-parallel processes share.

    Every process holds the whole weight and uses the part of its heads, so that its gradient is zero elsewhere and
    the sum over processes, which Megatron-Core takes of the norms of queries and keys, is the gradient.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        """`hidden_size` is one head's; `heads` counts those of the whole model."""
        super().__init__()
        self.eps, self.heads = eps, heads
        self.weight = _parameter(config, (heads * hidden_size,), 1.0)
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, heads of this process, head_dim]` to the same shape and type."""
        flat = x.float().flatten(2)
        copies = max(self.group.size() // self.heads, 1)  # processes that hold the same head
        squares = flat.square().sum(-1, keepdim=True) / copies
        # Forward a sum over processes; backward one as well, since each process goes on with the sum by itself.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=self.group), group=self.group
        )
        scaled = flat * torch.rsqrt(squares / self.weight.numel() + self.eps)
        first = self.group.rank() // copies * flat.shape[-1]
        weight = self.weight[first : first + flat.shape[-1]]
        return (weight * scaled.to(x.dtype)).view_as(x)


class EachHeadLayerNorm(_Checkpointed):
    """Layer normalisation over every head, without a bias and with a weight for each (Command-R+, StableLM 2 12B).

    Every process holds the whole weight and uses that of its heads, so that its gradient is zero elsewhere and the sum
    over processes, which Megatron-Core takes of the norms of queries and keys, is the gradient.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        """`hidden_size` is one head's; `heads` counts those of the whole model."""
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (heads, hidden_size), 1.0)
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, heads of this process, head_dim]` to the same shape and type."""
        heads = x.shape[2]
        copies = max(self.group.size() // len(self.weight), 1)  # processes that hold the same head
        first = self.group.rank() // copies * heads
        scaled = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight[first : first + heads].float() * scaled).to(x.dtype)


NormBuilder = Callable[..., torch.nn.Module]


def _classes(norm: Norm) -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    if not norm.affine:
        return FixedLayerNorm, CheckpointedFixedLayerNorm
    if norm.kind == "layernorm":
        return (LayerNorm, CheckpointedLayerNorm) if norm.bias else (PlainLayerNorm, CheckpointedPlainLayerNorm)
    return (RMSNorm1p, CheckpointedRMSNorm1p) if norm.zero_centered_gamma else (RMSNorm, CheckpointedRMSNorm)


def norm_of(norm: Norm, *, checkpointed: bool) -> NormBuilder:
    """A builder for a layer spec, which gives `norm`'s epsilon whatever Megatron-Core's configuration says.

    `checkpointed`: the norm is a checkpoint entry of its own, not part of the linear layer behind it.
    """
    kind = _classes(norm)[checkpointed]

    def build(*, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> torch.nn.Module:
        return kind(config=config, hidden_size=hidden_size, eps=norm.epsilon)

    return build


def qk_norms(attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
    """Builders of the norms of queries and of keys."""
    if attention.qk_norm is None:
        return None, None
    if attention.qk_norm == "head":
        return (norm_of(norm, checkpointed=True),) * 2
    kind = EachHeadLayerNorm if attention.qk_norm == "each_head" else ProjectionRMSNorm

    def of_heads(heads: int) -> NormBuilder:
        def build(*, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> torch.nn.Module:
            return kind(config=config, hidden_size=hidden_size, eps=norm.epsilon, heads=heads)

        return build

    return of_heads(attention.heads), of_heads(attention.groups)


def _parameter(config: TransformerConfig, shape: tuple[int, ...], value: float) -> torch.nn.Parameter:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(torch.full(shape, value, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter
