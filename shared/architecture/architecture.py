"""Architecture: the one model description. Every config.json is read into it; every Megatron-Core module is built from it.

Pure data, importable without torch or Megatron-Core. Dataclasses reject impossible values; `shared.model.support` lists
the possible ones that cannot be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from shared.architecture import dictionary
from shared.architecture.attention import Alibi, Attention, GatedDeltaNet, LatentAttention, Rotary
from shared.architecture.embedding_and_head import Embedding, Head, LearnedPositions
from shared.architecture.layer import Layer, NormPlacement, Residual, ResidualKind
from shared.architecture.mlp import MLP, Activation, MoE
from shared.architecture.norm import Norm
from shared.architecture.prefix_lm import PrefixLM
from shared.architecture.rope_scaling import RopeScaling
from shared.architecture.vision import Vision

__all__ = [
    "MLP",
    "MTP",
    "Activation",
    "Alibi",
    "Architecture",
    "Attention",
    "Embedding",
    "GatedDeltaNet",
    "Head",
    "LatentAttention",
    "Layer",
    "LearnedPositions",
    "MoE",
    "Norm",
    "NormPlacement",
    "PrefixLM",
    "Residual",
    "ResidualKind",
    "RopeScaling",
    "Rotary",
    "Vision",
]

VOCAB_MULTIPLE = 128  # Megatron-LM's default make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class MTP:
    """Multi-token prediction (DeepSeek V3, section 2.2): extra layers, not needed for next-token logits."""

    depth: int  # layers
    layer: Layer  # decoder layer of each MTP layer

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"MTP with {self.depth} layers is impossible")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer. Sizes are numbers of elements; weights of linear layers are `[out, in]`."""

    family: str
    hidden_size: int
    vocab_size: int  # without padding
    max_position_embeddings: int  # tokens
    embedding: Embedding = field(default_factory=Embedding)
    layers: tuple[Layer, ...]
    head: Head
    mtp: MTP | None = None
    prefix: PrefixLM | None = None  # None: causal
    vision: Vision | None = None  # vision tower: pass-through tensors, never trained
    initializer_range: float = 0.02  # standard deviation of random weights
    # intermediate_size of a config.json whose layers are all MoE: unused, written back on export.
    unused_ffn_hidden_size: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the model has no layers")
        if self.prefix:
            tokens = (self.prefix.start_token, *self.prefix.blank_tokens)
            if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
                raise ValueError(f"token id {max(tokens)} is out of range: vocab_size is {self.vocab_size}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """The distinct layers, in the order of their first appearance."""
        return tuple(dict.fromkeys(self.layers))

    @property
    def homogeneous(self) -> bool:
        """Whether all layers have the same tensors: Megatron-Core stacks homogeneous layers under one key."""
        return len({(type(layer.mixer), type(layer.mlp)) for layer in self.kinds}) == 1

    def layers_of(self, kind: type) -> tuple[int, ...]:
        """Indices from 0 of the layers whose mixer or MLP is of this class."""
        return tuple(
            index
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mixer, kind) or isinstance(layer.mlp, kind)
        )

    @cached_property
    def attention(self) -> Attention | LatentAttention:
        """The first attention layer's attention, for fields that are equal in all attention layers."""
        return next(k.mixer for k in self.kinds if isinstance(k.mixer, Attention | LatentAttention))

    @cached_property
    def mla(self) -> LatentAttention | None:
        """MLA; None for other attention."""
        return self.attention if isinstance(self.attention, LatentAttention) else None

    @cached_property
    def mlp(self) -> MLP | None:
        """The first dense MLP."""
        return next((k.mlp for k in self.kinds if isinstance(k.mlp, MLP)), None)

    @cached_property
    def moe(self) -> MoE | None:
        """The first MoE."""
        return next((k.mlp for k in self.kinds if isinstance(k.mlp, MoE)), None)

    @property
    def feed_forward(self) -> MLP:
        """The first dense MLP, or the first expert if all layers are MoE."""
        if self.mlp:
            return self.mlp
        assert self.moe is not None
        return self.moe.expert

    @cached_property
    def delta_net(self) -> GatedDeltaNet | None:
        """The first gated delta net."""
        return next((k.mixer for k in self.kinds if isinstance(k.mixer, GatedDeltaNet)), None)

    @property
    def mtp_depth(self) -> int:
        """Number of MTP layers."""
        return self.mtp.depth if self.mtp else 0

    @property
    def mtp_decoder(self) -> Architecture:
        """A one-layer model: the decoder layer of the MTP layers."""
        assert self.mtp is not None
        return replace(self, layers=(self.mtp.layer,), mtp=None)

    @property
    def table_size(self) -> int:
        """Columns of the embedding and of the output layer."""
        return self.embedding.factorised_size or self.hidden_size

    @property
    def position_rows(self) -> int:
        """Rows of each table of learned positions; one more with 2-D positions, whose block position starts at 1."""
        offset = self.embedding.positions.offset if self.embedding.positions else 0
        return self.max_position_embeddings + offset + (self.prefix is not None and self.prefix.position_streams > 1)

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding in Megatron form: a multiple of 128 on every tensor-parallel rank."""
        multiple = VOCAB_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def with_layers(self, change: Callable[[Layer], Layer]) -> Architecture:
        """The same model with `change` applied to every layer, MTP included; equal layers stay one object."""
        changed = {kind: change(kind) for kind in self.kinds}
        mtp = replace(self.mtp, layer=change(self.mtp.layer)) if self.mtp else None
        return replace(self, layers=tuple(changed[layer] for layer in self.layers), mtp=mtp)

    def with_values(
        self,
        *,
        attention: Mapping[str, Any] | None = None,
        rotary: Mapping[str, Any] | None = None,
        delta_net: Mapping[str, Any] | None = None,
        mlp: Mapping[str, Any] | None = None,
        moe: Mapping[str, Any] | None = None,
        norm: Mapping[str, Any] | None = None,
        residual: Mapping[str, Any] | None = None,
        layer: Mapping[str, Any] | None = None,
        embedding: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        num_layers: int | None = None,
        **fields: Any,
    ) -> Architecture:
        """The same model with nested fields replaced, in every layer that has them, MTP included.

        Args:
            attention, rotary, delta_net, mlp, moe, residual, layer, embedding, head: fields of the value of that name.
            norm: fields of every norm, those of embedding and head included.
            num_layers: number of layers; ValueError unless all layers are equal.
            fields: the Architecture's own fields.
        """

        def of_layer(one: Layer) -> Layer:
            mixer, feed_forward = one.mixer, one.mlp
            if isinstance(mixer, GatedDeltaNet):
                mixer = replace(mixer, **delta_net or {})
            else:
                if rotary and mixer.rotary:
                    mixer = replace(mixer, rotary=replace(mixer.rotary, **rotary))
                mixer = replace(mixer, **attention or {})
            feed_forward = replace(feed_forward, **(moe if isinstance(feed_forward, MoE) else mlp) or {})
            parts: dict[str, Any] = {
                "norm": replace(one.norm, **norm or {}),
                "residual": replace(one.residual, **residual or {}),
            }
            return replace(one, mixer=mixer, mlp=feed_forward, **parts, **layer or {})

        def with_norm(end: Any, given: Mapping[str, Any] | None) -> Any:
            own = {"norm": replace(end.norm, **norm or {})} if end.norm else {}
            return replace(end, **own | dict(given or {}))

        if num_layers is not None:
            if len(self.kinds) > 1:
                raise ValueError(f"num_layers {num_layers} of {len(self.kinds)} different layers; give layers instead")
            fields["layers"] = tuple(map(of_layer, self.kinds)) * num_layers
        ends: dict[str, Any] = {"embedding": with_norm(self.embedding, embedding), "head": with_norm(self.head, head)}
        return replace(self.with_layers(of_layer), **ends, **fields)

    def parameter_count(self, *, active: bool = False) -> int:
        """Number of parameters, without vocabulary padding, MTP layers and vision tower; `active`: top_k experts only."""
        hidden, embedding, head = self.hidden_size, self.embedding, self.head
        counts = {kind: kind.parameter_count(hidden, active=active) for kind in self.kinds}
        total = sum(counts[layer] for layer in self.layers)
        total += self.vocab_size * self.table_size * (1 if head.tied else 2) + self.vocab_size * head.bias
        if embedding.factorised_size is not None:
            total += 2 * embedding.factorised_size * hidden
        if embedding.positions:
            streams = self.prefix.position_streams if self.prefix else 1
            total += streams * self.position_rows * hidden
        return total + sum(norm.parameter_count(hidden) for norm in (embedding.norm, head.norm) if norm)

    def mtp_parameter_count(self, *, active: bool = False) -> int:
        """Number of parameters of the MTP layers, without the shared embedding and head."""
        if self.mtp is None:
            return 0
        hidden = self.hidden_size
        around = (3 + 2 * hidden) * hidden  # three norms and the projection of [embedding | hidden]
        return self.mtp.depth * (self.mtp.layer.parameter_count(hidden, active=active) + around)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for a manifest or a report."""
        return dictionary.write(self)
