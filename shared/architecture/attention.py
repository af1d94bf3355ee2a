"""Mixers: grouped-query attention (GQA), multi-head latent attention (MLA), gated delta nets.

Sizes are numbers of elements; weights of linear layers are `[out, in]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.architecture.rope_scaling import RopeScaling


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021)."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    dim: int | None = None  # partial rotary: leading elements of each head; None: all
    interleaved: bool = False  # pairs (0, 1), (2, 3).. (GPT-J, GLM), not (0, dim/2), (1, dim/2 + 1)..
    fp16_frequencies: bool = False  # inv_freq rounded to fp16 (GLM-130B)


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """Attention with linear biases (Press et al., 2022)."""

    bias_max: int = 8  # slope of the last head: 2^-bias_max, for a power-of-two number of heads
    rounded: bool = False  # bias = bf16(slope * position) * softmax scale (Falcon RW)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention with `groups` key/value heads (MHA: groups = heads, MQA: groups = 1)."""

    heads: int
    groups: int
    head_dim: int
    rotary: Rotary | None = None
    alibi: Alibi | None = None
    window: int | None = None  # sliding window in tokens, the query's own included
    bias: bool = False  # of q, k, v projections
    output_bias: bool = False
    # Norm of q and k before RoPE, of the layer's norm kind. head: over head_dim, weight [head_dim]. each_head: over
    # head_dim, weight [heads, head_dim]. projection: over heads * head_dim, weight [heads * head_dim].
    qk_norm: Literal["head", "each_head", "projection"] | None = None
    gate: bool = False  # attention output * sigmoid(gate projection) (Qwen3-Next)
    clip: float | None = None  # clamp q, k, v to [-clip, clip] (MPT)
    scale: float | None = None  # softmax scale; None: 1 / sqrt(head_dim)
    scale_by_layer: bool = False  # softmax scale / layer number, from 1 (GPT-2 scale_attn_by_inverse_layer_idx)
    softcap: float | None = None  # scores s -> cap * tanh(s / cap)
    sinks: bool = False  # attention sinks: one learned extra logit per head in the softmax (gpt-oss)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} attention heads are not divisible by {self.groups} key/value heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"sliding window {self.window} must be at least 1 token")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"softcap {self.softcap} must be positive")
        if self.rotary:
            if self.head_dim % 2:
                raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
            if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
                raise ValueError(f"rotary dim {self.rotary_dim} must be even and in 2..head_dim {self.head_dim}")
            _check_longrope(self.rotary, self.rotary_dim)
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(f"q, k, v clip {self.clip} must be positive")

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return self.head_dim if self.rotary is None or self.rotary.dim is None else self.rotary.dim

    @property
    def q_size(self) -> int:
        """Rows of the query projection, without the output gate."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection; as many of the value projection."""
        return self.groups * self.head_dim

    @property
    def output_size(self) -> int:
        """Columns of the output projection."""
        return self.heads * self.head_dim

    def parameter_count(self, hidden: int) -> int:
        """Number of parameters, QK norms (without bias) included."""
        qkv = self.q_size * (1 + self.gate) + 2 * self.kv_size
        count = hidden * (qkv + self.output_size) + self.bias * qkv + self.output_bias * hidden
        if self.qk_norm:
            count += 2 * self.head_dim if self.qk_norm == "head" else self.q_size + self.kv_size
        return count + self.sinks * self.heads


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention, MLA (DeepSeek V2, section 2.1).

    q = up(norm(down(x))) with rank `q_lora_rank`; k and v likewise with rank `kv_lora_rank`. RoPE is applied to the last
    `qk_rope_head_dim` elements of q and k; all heads share that part of k. The low-rank norms use `norm_epsilon`.
    """

    heads: int
    q_lora_rank: int | None  # None: one full-rank query projection
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rotary: Rotary
    norm_epsilon: float = 1e-6
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim < 1:
            raise ValueError(f"MLA: qk_rope_head_dim {self.qk_rope_head_dim} must be even: RoPE rotates pairs")
        if self.rotary.dim not in (None, self.qk_rope_head_dim):
            raise ValueError(f"MLA: rotary dim {self.rotary.dim} must equal qk_rope_head_dim {self.qk_rope_head_dim}")
        _check_longrope(self.rotary, self.qk_rope_head_dim)

    @property
    def groups(self) -> int:
        """Key/value heads: as many as heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Elements of one head's query: qk_nope_head_dim + qk_rope_head_dim."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return self.qk_rope_head_dim

    @property
    def q_size(self) -> int:
        """Rows of the query up-projection (of the query projection without q_lora_rank)."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all heads' keys."""
        return self.heads * self.head_dim

    @property
    def output_size(self) -> int:
        """Columns of the output projection."""
        return self.heads * self.v_head_dim

    def parameter_count(self, hidden: int) -> int:
        """Number of parameters, low-rank norms included."""
        rank, queries = self.kv_lora_rank, hidden * self.q_size
        if low := self.q_lora_rank:
            queries = hidden * low + low + low * self.q_size
        keys = hidden * (rank + self.qk_rope_head_dim) + rank
        values = rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + keys + values + self.output_size * hidden


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet:
    """Gated delta net (Yang et al., 2024): linear attention with state `[value_heads, key_head_dim, value_head_dim]`.

    value_heads / key_heads consecutive value heads share one key head, as query heads share key/value heads in GQA.
    """

    key_heads: int  # as many query heads
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int  # kernel size of the causal depthwise convolution of q, k and v, in tokens

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads} value heads are not divisible by {self.key_heads} key heads")

    @property
    def key_size(self) -> int:
        """Rows of the key projection; as many of the query projection."""
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Rows of the value projection; as many of the output gate's."""
        return self.value_heads * self.value_head_dim

    def parameter_count(self, hidden: int) -> int:
        """Number of parameters, convolution and output norm included."""
        projected = 2 * self.key_size + 2 * self.value_size + 2 * self.value_heads
        convolution = (2 * self.key_size + self.value_size) * self.conv_kernel
        rest = 2 * self.value_heads + self.value_head_dim + self.value_size * hidden
        return hidden * projected + convolution + rest


def _check_longrope(rotary: Rotary, rotary_dim: int) -> None:
    factors = rotary.scaling.short_factors if rotary.scaling else ()
    if factors and 2 * len(factors) != rotary_dim:
        raise ValueError(f"longrope has {len(factors)} factors; rotary dim {rotary_dim} needs {rotary_dim // 2}")
