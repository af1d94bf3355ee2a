"""The one description of a model: what every family's configuration is read into and every builder reads from.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

VOCAB_MULTIPLE = 128  # Megatron-LM's default make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained at.

    `linear` divides every position by `factor`; `llama3` (LLaMA 3.1) divides low frequencies only, with a smooth
    passage between the wavelengths `original_length / high_frequency_factor` and
    `original_length / low_frequency_factor`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope scaling factor must be at least 1, not {self.factor}")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer. Sizes are counts of elements; every projection is `[out, in]`."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads; equal to num_attention_heads for MHA
    head_dim: int  # given by the family, not always hidden_size / num_attention_heads
    vocab_size: int  # without padding
    max_position_embeddings: int  # tokens
    norm: Literal["rmsnorm"] = "rmsnorm"
    norm_epsilon: float
    activation: Literal["swiglu"] = "swiglu"
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on queries and keys, before rotation
    tied_embeddings: bool
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.head_dim

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding in Megatron form: a multiple of 128 on every tensor-parallel rank."""
        multiple = VOCAB_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def parameter_count(self) -> int:
        """Number of weights, without vocabulary padding."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        qkv = self.q_size + 2 * self.kv_size
        attention = self.hidden_size * (qkv + self.q_size)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        biases = (
            self.qkv_bias * qkv
            + self.attention_output_bias * self.hidden_size
            + self.mlp_bias * (2 * self.ffn_hidden_size + self.hidden_size)
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (norms + attention + mlp + biases) + embeddings + self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for a manifest or a report."""
        return asdict(self)
