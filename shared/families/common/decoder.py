"""The config.json fields that all families have, to Architecture and back.

`read_decoder` reads them under a family's `Spelling`; `Decoder.build` adds the family's own; `write_decoder` is the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shared.architecture.architecture import (
    MLP,
    MTP,
    Activation,
    Architecture,
    Attention,
    Embedding,
    Head,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    NormPlacement,
    PrefixLM,
    Residual,
    Rotary,
)
from shared.architecture.layer import Mixer
from shared.errors import UserError
from shared.families.common.fields import Fields, rope_fields

SILU: Mapping[str, Activation] = {"silu": "swiglu", "swish": "swiglu"}
GELU: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES: Mapping[Activation, str] = {
    "swiglu": "silu",
    "quick_geglu": "silu",  # gpt-oss
    "geglu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
_NOTHING: Mapping[str, Any] = {}
MOST_LAYERS = 100_000  # upper bound of a plausible num_hidden_layers: `Architecture.layers` lists every layer


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Field names of a family's config.json; defaults: LLaMA's. None: the family has no such field."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    ffn: str | None = "intermediate_size"  # None: 4 * hidden, unless the family says otherwise
    heads: str = "num_attention_heads"
    groups: str | None = "num_key_value_heads"  # None: as many as heads
    head_dim: str | None = "head_dim"  # None: hidden / heads
    vocab: str = "vocab_size"
    positions: str = "max_position_embeddings"
    epsilon: str | None = "rms_norm_eps"
    activation: str | None = "hidden_act"
    tied: str | None = "tie_word_embeddings"
    initializer_range: str | None = "initializer_range"
    attention_dropout: str | None = "attention_dropout"
    hidden_dropout: str | None = None
    embedding_dropout: str | None = None


LLAMA = Spelling()


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Values of the common fields, as constructor arguments of Attention, MLP, Norm, Head, Residual, Embedding."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    initializer_range: float
    attention: dict[str, Any]
    mlp: dict[str, Any]
    norm: dict[str, Any]
    head: dict[str, Any]
    residual: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    local_theta: float | None = None  # RoPE base of sliding-window layers, if given

    @property
    def heads(self) -> int:
        return int(self.attention["heads"])

    @property
    def head_dim(self) -> int:
        return int(self.attention["head_dim"])

    @property
    def rotary(self) -> Rotary:
        rotary: Rotary = self.attention["rotary"]
        return rotary

    def expert(self, ffn_hidden_size: int, **further: Any) -> MLP:
        """An expert with the activation of `mlp`."""
        return MLP(**{**self.mlp, "ffn_hidden_size": ffn_hidden_size, **further})

    def build(
        self,
        family: str,
        *,
        mixer: Mixer | None = None,
        attention: Mapping[str, Any] = _NOTHING,
        mlp: Mapping[str, Any] = _NOTHING,
        moe: MoE | None = None,
        dense_layers: Collection[int] = (),
        norm: Mapping[str, Any] = _NOTHING,
        norm_placement: NormPlacement = "pre",
        residual: Mapping[str, Any] = _NOTHING,
        embedding: Mapping[str, Any] = _NOTHING,
        embedding_norm: bool = False,
        head: Mapping[str, Any] = _NOTHING,
        final_norm: bool = True,
        vary: Callable[[int, Layer], Layer] | None = None,
        mtp: int = 0,
        prefix: PrefixLM | None = None,
    ) -> Architecture:
        """The Architecture; `attention`, `mlp`, `norm`, `residual`, `embedding`, `head` override the common fields.

        Args:
            family: its name.
            mixer: replaces Attention.
            moe: replaces the MLP, except in `dense_layers`.
            vary: (layer index from 0, common layer) -> the layer with this index.
            mtp: number of MTP layers, each with the common layer.
        """
        norms = Norm(**{**self.norm, **norm})
        dense = MLP(**{**self.mlp, **mlp})
        common = Layer(
            mixer=mixer or Attention(**{**self.attention, **attention}),
            mlp=moe or dense,
            norm=norms,
            norm_placement=norm_placement,
            residual=Residual(**{**self.residual, **residual}),
        )

        def layer(index: int) -> Layer:
            own = replace(common, mlp=dense) if index in dense_layers else common
            return vary(index, own) if vary else own

        shared: dict[Layer, Layer] = {}
        layers = tuple(shared.setdefault(own, own) for own in map(layer, range(self.num_layers)))
        return Architecture(
            family=family,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            embedding=Embedding(**{**self.embedding, "norm": norms if embedding_norm else None, **embedding}),
            layers=layers,
            head=Head(**{**self.head, "norm": norms if final_norm else None, **head}),
            mtp=MTP(depth=mtp, layer=common) if mtp else None,
            prefix=prefix,
            initializer_range=self.initializer_range,
            unused_ffn_hidden_size=None if any(own.mlp is dense for own in shared) else dense.ffn_hidden_size,
        )


def read_decoder(
    fields: Fields,
    spelling: Spelling = LLAMA,
    *,
    rotary: bool = True,
    default_theta: float = 10_000.0,
    rotary_fraction: float | None = None,
    interleaved: bool = False,
    rope_by_kind: bool = False,
    default_head_dim: int | None = None,
    ffn_ratio: int | None = None,
    default_positions: int | None = None,
    default_epsilon: float = 1e-6,
    activations: Mapping[str, Activation] = SILU,
    default_activation: str = "silu",
    tied: bool = False,
    initializer_range: float = 0.02,
    dropout: float = 0.0,
) -> Decoder:
    """The common fields. Defaults for absent fields are those of the transformers class.

    Args:
        fields: config.json.
        spelling: field names.
        rotary: read RoPE from `rope_theta`, `rope_scaling`, `rope_parameters`.
        rotary_fraction: default of `partial_rotary_factor`; None: the family has no such field.
        interleaved: RoPE pairs are (0, 1), (2, 3)...
        rope_by_kind: sliding-window layers have their own RoPE.
        ffn_ratio: default of ffn / hidden.
        dropout: default of attention, hidden and embedding dropout.
    """
    hidden, heads = fields.get(spelling.hidden, int), fields.get(spelling.heads, int)
    positions = fields.get(spelling.positions, int, default_positions)
    head_dim = default_head_dim or hidden // heads
    head_dim = fields.get(spelling.head_dim, int, head_dim) if spelling.head_dim else head_dim
    attention: dict[str, Any] = {
        "heads": heads,
        "groups": fields.get(spelling.groups, int, heads) if spelling.groups else heads,
        "head_dim": head_dim,
    }
    local_theta = None
    if rotary:
        if rope_by_kind:
            theta, scaling, local_theta = fields.rope_by_kind(default_theta, positions)
        else:
            theta, scaling = fields.rope(default_theta, positions, partial=rotary_fraction is not None)
        dim = None if rotary_fraction is None else rotary_dim(fields, head_dim, rotary_fraction)
        attention["rotary"] = Rotary(theta=theta, scaling=scaling, dim=dim, interleaved=interleaved)

    def dropped(name: str | None) -> float:
        return 0.0 if name is None else float(fields.get(name, float, dropout))

    attention["dropout"] = dropped(spelling.attention_dropout)
    ffn = 4 * hidden
    if spelling.ffn:
        ffn = fields.get(spelling.ffn, int, None if ffn_ratio is None else ffn_ratio * hidden)
    mlp: dict[str, Any] = {"ffn_hidden_size": ffn}
    if spelling.activation:
        mlp["activation"] = activation(fields, spelling.activation, activations, default_activation)
    layers = fields.get(spelling.layers, int)
    if layers > MOST_LAYERS:
        raise UserError(f"config.json: {spelling.layers} is {layers}; at most {MOST_LAYERS} layers are supported")
    return Decoder(
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=fields.get(spelling.vocab, int),
        max_position_embeddings=positions,
        initializer_range=fields.get(spelling.initializer_range, float, initializer_range)
        if spelling.initializer_range
        else initializer_range,
        attention=attention,
        mlp=mlp,
        norm={"epsilon": fields.get(spelling.epsilon, float, default_epsilon) if spelling.epsilon else default_epsilon},
        head={"tied": fields.get(spelling.tied, bool, tied) if spelling.tied else tied},
        residual={"dropout": dropped(spelling.hidden_dropout)},
        embedding={"dropout": dropped(spelling.embedding_dropout)},
        local_theta=local_theta,
    )


def activation(fields: Fields, field: str, known: Mapping[str, Activation], default: str) -> Activation:
    """The `Activation` of config.json's activation field."""
    fields.expect(field, *known, why=f"supported: {', '.join(known)}")
    return known[fields.get(field, str, default)]


def rotary_dim(fields: Fields, head_dim: int, default: float, name: str = "partial_rotary_factor") -> int | None:
    """rotary_dim of partial rotary, rounded down as in transformers; None: all of head_dim."""
    rotated = int(head_dim * fields.rotary_fraction(default, name))
    return None if rotated == head_dim else rotated


def with_mixer(layer: Layer, **changes: Any) -> Layer:
    """The layer with fields of its mixer replaced."""
    return replace(layer, mixer=replace(layer.mixer, **changes))


def attention_of(a: Architecture) -> Attention:
    """The attention, which is not MLA."""
    assert isinstance(a.attention, Attention)
    return a.attention


def mlp_of(a: Architecture) -> MLP:
    """The dense MLP, which exists."""
    assert a.mlp is not None
    return a.mlp


def moe_of(a: Architecture) -> MoE:
    """The MoE, which exists."""
    assert a.moe is not None
    return a.moe


def rotary_of(a: Architecture) -> Rotary:
    """RoPE of the full-attention layers; of the sliding-window layers if there are no others."""
    mixers = [kind.mixer for kind in a.kinds if isinstance(kind.mixer, Attention | LatentAttention)]
    full = (m.rotary for m in mixers if not isinstance(m, Attention) or m.window is None)
    return next((rotary for rotary in full if rotary), None) or local_rotary_of(a) or Rotary()


def local_rotary_of(a: Architecture) -> Rotary | None:
    """RoPE of the sliding-window layers."""
    mixers = [kind.mixer for kind in a.kinds]
    return next((m.rotary for m in mixers if isinstance(m, Attention) and m.window is not None and m.rotary), None)


def write_decoder(
    a: Architecture, spelling: Spelling = LLAMA, *, rotary: bool = True, partial: bool = False, head_dim: bool = True
) -> dict[str, Any]:
    """Inverse of `read_decoder`.

    Args:
        a: the architecture.
        spelling: field names.
        rotary: write RoPE to `rope_theta`, `rope_scaling`, `rope_parameters`.
        partial: the family has `partial_rotary_factor`.
        head_dim: write it; False for classes whose head_dim is always hidden / heads.
    """
    ffn = a.mlp.ffn_hidden_size if a.mlp else a.unused_ffn_hidden_size
    given: dict[str | None, Any] = {
        spelling.layers: a.num_layers,
        spelling.hidden: a.hidden_size,
        spelling.ffn: ffn,
        spelling.heads: a.attention.heads,
        spelling.groups: a.attention.groups,
        spelling.head_dim if head_dim else None: a.attention.head_dim,
        spelling.vocab: a.vocab_size,
        spelling.positions: a.max_position_embeddings,
        spelling.activation: _activation_name(a.feed_forward.activation) if spelling.activation else None,
        spelling.epsilon: a.layers[0].norm.epsilon,
        spelling.tied: a.head.tied,
        spelling.attention_dropout: a.attention.dropout,
        spelling.hidden_dropout: a.layers[0].residual.dropout,
        spelling.embedding_dropout: a.embedding.dropout,
        spelling.initializer_range: a.initializer_range,
    }
    written = {name: value for name, value in given.items() if name is not None}
    if rotary:
        of_layers = rotary_of(a)
        fraction = a.attention.rotary_dim / a.attention.head_dim if partial else None
        written |= rope_fields(of_layers.theta, of_layers.scaling, fraction)
    return written


def _activation_name(activation: Activation) -> str:
    if activation not in _ACTIVATION_NAMES:
        raise UserError(f"transformers has no activation {activation}")
    return _ACTIVATION_NAMES[activation]
