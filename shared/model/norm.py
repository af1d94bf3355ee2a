"""Norms for Megatron-Core's layer specs, with and without sequence parallelism."""

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

    Rounding as in transformers' LlamaRMSNorm: normalise in fp32, downcast to the input dtype, multiply by the weight.
    Megatron-Core's WrappedTorchNorm refuses sequence parallelism; this one sets `weight.sequence_parallel`, so
    Megatron-Core all-reduces its gradient over tensor-parallel ranks.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (hidden_size,), 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]`, shape and dtype unchanged."""
        return self.weight * self.scaled(x.float()).to(x.dtype)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps)`, fp32.

        One kernel on a GPU; on the CPU the operations of the formula. With the weight it would round once, not as documented.
        """
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm with zero-centred gamma (Gemma): `(1 + weight) * x / rms(x)` in fp32, one downcast.

    Megatron-Core's `layernorm_zero_centered_gamma`.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)
        with torch.no_grad():
            self.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]`, shape and dtype unchanged."""
        return (self.scaled(x.float()) * (1.0 + self.weight.float())).to(x.dtype)


class BiaslessLayerNorm(torch.nn.Module):
    """LayerNorm (Ba et al., 2016) with weight, without bias: `torch.nn.LayerNorm(bias=False)`."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (hidden_size,), 1.0)
        self.bias: torch.nn.Parameter | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]`, shape and dtype unchanged."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class LayerNorm(BiaslessLayerNorm):
    """LayerNorm with weight and bias."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config=config, hidden_size=hidden_size, eps=eps)
        self.bias = _parameter(config, (hidden_size,), 0.0)


class NonAffineLayerNorm(torch.nn.Module):
    """LayerNorm without affine parameters (`elementwise_affine=False`; Galactica 30B).

    weight = 1 and bias = 0 are buffers: stored in checkpoints, for loaders whose norms have weights, and never trained.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            self.register_buffer(name, _parameter(config, (hidden_size,), value).data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]`, shape and dtype unchanged."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _WithExtraState(torch.nn.Module):
    """Mixin: an empty `_extra_state` in the checkpoint, as TransformerEngine's norm modules have.

    Loaders with TransformerEngine's layer spec require one for the final norm and the QK norms. Input norms are part of
    TransformerEngine's LayerNormLinear and have none.
    """

    def get_extra_state(self) -> None:
        """None, as in TransformerEngine without FP8."""
        return None

    def set_extra_state(self, state: object) -> None:
        """Ignore the state."""


class RMSNormWithExtraState(_WithExtraState, RMSNorm):
    """`RMSNorm` with an `_extra_state`."""


class ZeroCenteredRMSNormWithExtraState(_WithExtraState, ZeroCenteredRMSNorm):
    """`ZeroCenteredRMSNorm` with an `_extra_state`."""


class BiaslessLayerNormWithExtraState(_WithExtraState, BiaslessLayerNorm):
    """`BiaslessLayerNorm` with an `_extra_state`."""


class LayerNormWithExtraState(_WithExtraState, LayerNorm):
    """`LayerNorm` with an `_extra_state`."""


class NonAffineLayerNormWithExtraState(_WithExtraState, NonAffineLayerNorm):
    """`NonAffineLayerNorm` with an `_extra_state`."""


class ProjectionRMSNorm(_WithExtraState):
    """QK norm over the whole projection (OLMo 2): RMSNorm over heads * head_dim, heads split over tensor-parallel ranks.

    Every rank holds the whole weight and uses its heads' part; its gradient is zero elsewhere. Megatron-Core sums the
    gradients of QK norms over tensor-parallel ranks, which gives the full gradient.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        """`hidden_size`: head_dim. `heads`: of all ranks."""
        super().__init__()
        self.eps, self.heads = eps, heads
        self.weight = _parameter(config, (heads * hidden_size,), 1.0)
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, heads / tensor_parallel, head_dim]`, shape and dtype unchanged."""
        flat = x.float().flatten(2)
        copies = max(self.group.size() // self.heads, 1)  # ranks per head, where TP exceeds heads
        squares = flat.square().sum(-1, keepdim=True) / copies
        # All-reduce forward (reduce_from) and backward (copy_to): every rank uses the sum for its own heads.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=self.group), group=self.group
        )
        scaled = flat * torch.rsqrt(squares / self.weight.numel() + self.eps)
        first = self.group.rank() // copies * flat.shape[-1]
        weight = self.weight[first : first + flat.shape[-1]]
        return (weight * scaled.to(x.dtype)).view_as(x)


class PerHeadLayerNorm(_WithExtraState):
    """QK norm per head: LayerNorm over head_dim, weight `[heads, head_dim]`, no bias (Command-R+, StableLM 2 12B).

    Every rank holds the whole weight and uses its heads' part, as in `ProjectionRMSNorm`.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        """`hidden_size`: head_dim. `heads`: of all ranks."""
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, (heads, hidden_size), 1.0)
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, heads / tensor_parallel, head_dim]`, shape and dtype unchanged."""
        heads = x.shape[2]
        copies = max(self.group.size() // len(self.weight), 1)  # ranks per head, where TP exceeds heads
        first = self.group.rank() // copies * heads
        scaled = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight[first : first + heads].float() * scaled).to(x.dtype)


NormBuilder = Callable[..., torch.nn.Module]


def _classes(norm: Norm) -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    if not norm.affine:
        return NonAffineLayerNorm, NonAffineLayerNormWithExtraState
    if norm.kind == "layernorm":
        return (
            (LayerNorm, LayerNormWithExtraState) if norm.bias else (BiaslessLayerNorm, BiaslessLayerNormWithExtraState)
        )
    if norm.zero_centered_gamma:
        return ZeroCenteredRMSNorm, ZeroCenteredRMSNormWithExtraState
    return RMSNorm, RMSNormWithExtraState


def norm_of(norm: Norm, *, extra_state: bool) -> NormBuilder:
    """Builder of a norm for a layer spec, with `norm.epsilon` whatever `layernorm_epsilon` says.

    `extra_state`: with an `_extra_state` in the checkpoint; False for norms that are part of a LayerNormLinear there.
    """
    kind = _classes(norm)[extra_state]

    def build(*, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> torch.nn.Module:
        return kind(config=config, hidden_size=hidden_size, eps=norm.epsilon)

    return build


def qk_norms(attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
    """Builders of the norms of q and of k."""
    if attention.qk_norm is None:
        return None, None
    if attention.qk_norm == "head":
        return (norm_of(norm, extra_state=True),) * 2
    kind = PerHeadLayerNorm if attention.qk_norm == "each_head" else ProjectionRMSNorm

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
