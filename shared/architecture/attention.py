"""Mixers of tokens: attention with grouped queries, multi-head latent attention (MLA), gated delta nets.

Sizes are counts of elements; a projection is `[out, in]`.
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
    dim: int | None = None  # leading elements of each head that are rotated; None: all
    interleaved: bool = False  # pairs are neighbours (GPT-J, GLM), not half a head apart
    fp16_frequencies: bool = False  # frequencies are rounded to fp16 (GLM-130B)


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """Attention with linear biases (Press et al., 2022)."""

    bias_max: int = 8  # the last head's slope is 2^-bias_max, for a power-of-two number of heads
    rounded: bool = False  # slope * position in bf16, times the softmax scale (Falcon RW)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention; `groups` key/value heads (MHA: groups = heads, MQA: groups = 1)."""

    heads: int
    groups: int
    head_dim: int
    rotary: Rotary | None = None
    alibi: Alibi | None = None
    window: int | None = None  # tokens that a position attends to, itself included
    bias: bool = False  # of q, k, v
    output_bias: bool = False
    # RMSNorm or LayerNorm of queries and keys before rotation, of the layer's kind: over head_dim with one weight for all
    # heads, over head_dim with a weight for each head, or over the whole projection.
    qk_norm: Literal["head", "each_head", "projection"] | None = None
    gate: bool = False  # each head's output times sigmoid of a projection of the token (Qwen3-Next)
    clip: float | None = None  # clamp q, k, v to [-clip, clip] (MPT)
    scale: float | None = None  # of q k; None: 1 / sqrt(head_dim)
    scale_by_layer: bool = False  # scores are divided by the layer's number, from 1, too (GPT-2)
    softcap: float | None = None  # scores s -> cap * tanh(s / cap)
    sinks: bool = False  # one more learned score a head, without a value (gpt-oss)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} attention heads are not a multiple of {self.groups} key/value heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a sliding window of {self.window} tokens is impossible")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"a soft cap of {self.softcap} is impossible")
        if self.rotary:
            if self.head_dim % 2:
                raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
            if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
                raise ValueError(f"rotary embedding of {self.rotary_dim} of {self.head_dim} elements is impossible")
            _check_longrope(self.rotary, self.rotary_dim)
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(f"queries, keys and values are clipped at {self.clip}; a positive number is wanted")

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return self.head_dim if self.rotary is None or self.rotary.dim is None else self.rotary.dim

    @property
    def q_size(self) -> int:
        """Rows of the query projection, without gates."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.head_dim

    @property
    def output_size(self) -> int:
        """Columns of the output projection."""
        return self.heads * self.head_dim

    def parameter_count(self, hidden: int) -> int:
        """Weights, with the norms of queries and keys (which have no bias)."""
        qkv = self.q_size * (1 + self.gate) + 2 * self.kv_size
        count = hidden * (qkv + self.output_size) + self.bias * qkv + self.output_bias * hidden
        if self.qk_norm:
            count += 2 * self.head_dim if self.qk_norm == "head" else self.q_size + self.kv_size
        return count + self.sinks * self.heads


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention, MLA (DeepSeek V2, section 2.1).

    Queries, and keys with values, come from low-rank vectors, each behind an RMSNorm of its own epsilon. The last
    `qk_rope_head_dim` elements of a head's query and key are rotated; that part of the key is one for all heads.
    """

    heads: int
    q_lora_rank: int | None  # None: queries are projected directly
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
            raise ValueError(f"MLA with qk_rope_head_dim {self.qk_rope_head_dim} is impossible: pairs are rotated")
        if self.rotary.dim not in (None, self.qk_rope_head_dim):
            raise ValueError(f"MLA rotates qk_rope_head_dim {self.qk_rope_head_dim} elements, not {self.rotary.dim}")
        _check_longrope(self.rotary, self.qk_rope_head_dim)

    @property
    def groups(self) -> int:
        """Key/value heads: as many as heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Elements of a query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return self.qk_rope_head_dim

    @property
    def q_size(self) -> int:
        """Rows of the query (up-)projection."""
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
        """Weights, with the norms of the low-rank vectors."""
        rank, queries = self.kv_lora_rank, hidden * self.q_size
        if low := self.q_lora_rank:
            queries = hidden * low + low + low * self.q_size
        keys = hidden * (rank + self.qk_rope_head_dim) + rank
        values = rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + keys + values + self.output_size * hidden


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet:
    """A gated delta net (Yang et al., 2024) in place of attention.

    A value head has a state `[key_head_dim, value_head_dim]`. Value heads share key heads in equal runs.
    """

    key_heads: int  # and of queries
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int  # tokens of the causal convolution over each channel of q, k and v

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads} value heads are not a multiple of {self.key_heads} key heads")

    @property
    def key_size(self) -> int:
        """Rows of the projection to keys, and of that to queries."""
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Rows of the projection to values, and of that to their gates."""
        return self.value_heads * self.value_head_dim

    def parameter_count(self, hidden: int) -> int:
        """Weights, with the convolution and the norm of the output."""
        projected = 2 * self.key_size + 2 * self.value_size + 2 * self.value_heads
        convolution = (2 * self.key_size + self.value_size) * self.conv_kernel
        rest = 2 * self.value_heads + self.value_head_dim + self.value_size * hidden
        return hidden * projected + convolution + rest


def _check_longrope(rotary: Rotary, rotary_dim: int) -> None:
    factors = rotary.scaling.short_factors if rotary.scaling else ()
    if factors and 2 * len(factors) != rotary_dim:
        raise ValueError(f"{len(factors)} factors of longrope for {rotary_dim} rotated elements are impossible")
