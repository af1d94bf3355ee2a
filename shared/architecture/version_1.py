"""Version 1 of the architecture in manifests: flat fields; tuples of layer indices say which layers differ.

Read-only, for manifests of the first releases. New code does not use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from shared.architecture.attention import Alibi, Attention, GatedDeltaNet, LatentAttention, Rotary
from shared.architecture.embedding_and_head import Embedding, Head, LearnedPositions
from shared.architecture.layer import Layer, NormPlacement, Residual, ResidualKind
from shared.architecture.mlp import MLP, Activation, MoE
from shared.architecture.norm import Norm
from shared.architecture.prefix_lm import PrefixLM
from shared.architecture.rope_scaling import RopeScaling
from shared.architecture.vision import Vision

if TYPE_CHECKING:
    from shared.architecture.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Experts:
    count: int
    top_k: int
    ffn_hidden_size: int
    bias: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scaling: float = 1.0
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score_of: int = 2
    shared_ffn_hidden_size: int | None = None
    shared_gate: bool = False
    auxiliary_loss: float = 0.0
    auxiliary_loss_of: Literal["batch", "sequence"] = "batch"
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Latent:
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Delta:
    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class Prefix:
    start_token: int
    blank_tokens: tuple[int, ...]
    counted_tokens: tuple[int, ...] = ()
    earliest: bool = False


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The fields of version 1, with their defaults."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    initializer_range: float = 0.02
    norm: Literal["rmsnorm", "rmsnorm_1p", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    norm_epsilon: float
    norm_affine: bool = True
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    embedding_norm: bool = False
    embedding_size: int | None = None
    residual: ResidualKind = "sequential"
    activation: Activation = "swiglu"
    glu_limit: float | None = None
    glu_offset: float = 0.0
    mlp_bias: bool = False
    experts: Experts | None = None
    prediction_layers: int = 0
    positions: Literal["rope", "learned", "alibi"] = "rope"
    position_streams: Literal[1, 2] = 1
    alibi: Literal["exact", "rounded"] = "exact"
    alibi_bias_max: int = 8
    learned_position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window_rope_theta: float | None = None
    rotary_dim: int | None = None
    rotary_fp16: bool = False
    rotary_interleaved: bool = False
    layers_without_rope: tuple[int, ...] = ()
    prefix: Prefix | None = None
    latent: Latent | None = None
    delta: Delta | None = None
    attention_gate: bool = False
    qkv_bias: bool = False
    qkv_clip: float | None = None
    attention_output_bias: bool = False
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "each_head", "projection"] = "head"
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False
    attention_softcap: float | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    input_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    output_bias: bool = False
    normalized_head: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    vision: Vision | None = None


def read(data: Mapping[str, Any]) -> Architecture:
    """The architecture from version 1 JSON."""
    parts = {
        "experts": Experts,
        "latent": Latent,
        "delta": Delta,
        "prefix": Prefix,
        "rope_scaling": RopeScaling,
        "vision": Vision,
    }

    def value(name: str, given: Any) -> Any:
        if isinstance(given, Mapping):
            return parts[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
        return tuple(given) if isinstance(given, list) else given

    return nested(**{name: value(name, given) for name, given in data.items()})


def nested(**fields: Any) -> Architecture:
    """The architecture from version 1 fields."""
    from shared.architecture.architecture import MTP, Architecture

    f = Flat(**fields)
    experts, delta = f.experts, f.delta
    marked = f.layers_without_rope + f.full_attention_layers
    marked += (experts.dense_layers if experts else ()) + (delta.layers if delta else ())
    if marked and not 0 <= min(marked) <= max(marked) < f.num_layers:
        raise ValueError(f"layer index {max(marked)} is out of range: the model has {f.num_layers} layers")
    norm = Norm(
        kind="layernorm" if f.norm == "layernorm" else "rmsnorm",
        epsilon=f.norm_epsilon,
        bias=f.norm_bias,
        affine=f.norm_affine,
        zero_centered_gamma=f.norm == "rmsnorm_1p",
    )
    mlp = _mlp(f, f.ffn_hidden_size)
    residual = Residual(
        kind=f.residual,
        multiplier=f.residual_multiplier,
        input_multiplier=f.input_multiplier,
        dropout=f.hidden_dropout,
    )

    def layer(index: int) -> Layer:
        dense = experts is None or index in experts.dense_layers
        return Layer(
            mixer=_delta_net(delta) if delta and index in delta.layers else _attention(f, index),
            mlp=mlp if dense else _moe(f, experts),  # type: ignore[arg-type]
            norm=norm,
            norm_placement=f.norm_placement,
            residual=residual,
        )

    shared: dict[Layer, Layer] = {}
    layers = tuple(shared.setdefault(made, made) for made in map(layer, range(f.num_layers)))
    # MTP layers: full attention with RoPE, MoE if the model has it.
    plain = replace(f, layers_without_rope=(), full_attention_layers=(), delta=None)
    within = Layer(
        mixer=_attention(plain, 0),
        mlp=_moe(f, experts) if experts else mlp,
        norm=norm,
        norm_placement=f.norm_placement,
        residual=residual,
    )
    prefix = f.prefix
    return Architecture(
        family=f.family,
        hidden_size=f.hidden_size,
        vocab_size=f.vocab_size,
        max_position_embeddings=f.max_position_embeddings,
        embedding=Embedding(
            factorised_size=f.embedding_size,
            multiplier=f.embedding_multiplier,
            norm=norm if f.embedding_norm else None,
            positions=LearnedPositions(offset=f.learned_position_offset) if f.positions == "learned" else None,
            dropout=f.embedding_dropout,
        ),
        layers=layers,
        head=Head(
            tied=f.tied_embeddings,
            norm=norm if f.final_norm else None,
            bias=f.output_bias,
            normalized=f.normalized_head,
            multiplier=f.logit_multiplier,
            softcap=f.logit_softcap,
        ),
        mtp=MTP(depth=f.prediction_layers, layer=within) if f.prediction_layers else None,
        prefix=None
        if prefix is None
        else PrefixLM(
            start_token=prefix.start_token,
            blank_tokens=prefix.blank_tokens,
            counted_tokens=prefix.counted_tokens,
            earliest=prefix.earliest,
            position_streams=f.position_streams,
        ),
        vision=f.vision,
        initializer_range=f.initializer_range,
        unused_ffn_hidden_size=f.ffn_hidden_size if all(isinstance(k.mlp, MoE) for k in shared) else None,
    )


def _mlp(f: Flat, size: int) -> MLP:
    return MLP(
        ffn_hidden_size=size, activation=f.activation, bias=f.mlp_bias, clamp=f.glu_limit, up_offset=f.glu_offset
    )


def _moe(f: Flat, experts: Experts) -> MoE:
    expert = MLP(
        ffn_hidden_size=experts.ffn_hidden_size,
        activation=f.activation,
        bias=experts.bias,
        clamp=f.glu_limit,
        up_offset=f.glu_offset,
    )
    size = experts.shared_ffn_hidden_size
    return MoE(
        experts=experts.count,
        top_k=experts.top_k,
        expert=expert,
        shared=None if size is None else replace(expert, ffn_hidden_size=size),
        shared_gate=experts.shared_gate,
        router_bias=experts.bias,
        score=experts.score,
        normalized=experts.normalized,
        scaling=experts.scaling,
        correction_bias=experts.correction_bias,
        groups=experts.groups,
        top_groups=experts.top_groups,
        group_score_top=experts.group_score_of,
        auxiliary_loss=experts.auxiliary_loss,
        auxiliary_loss_over=experts.auxiliary_loss_of,
    )


def _delta_net(delta: Delta) -> GatedDeltaNet:
    return GatedDeltaNet(
        key_heads=delta.key_heads,
        value_heads=delta.value_heads,
        key_head_dim=delta.key_head_dim,
        value_head_dim=delta.value_head_dim,
        conv_kernel=delta.conv_kernel,
    )


def _attention(f: Flat, index: int) -> Attention | LatentAttention:
    window = None if index in f.full_attention_layers else f.sliding_window
    rotary = None
    if f.positions == "rope" and index not in f.layers_without_rope:
        rotary = Rotary(
            theta=f.rope_theta,
            scaling=f.rope_scaling,
            dim=None if f.rotary_dim == f.head_dim else f.rotary_dim,
            interleaved=f.rotary_interleaved,
            fp16_frequencies=f.rotary_fp16,
        )
        if window is not None and f.window_rope_theta is not None:
            rotary = replace(rotary, theta=f.window_rope_theta, scaling=None)
    if latent := f.latent:
        assert rotary is not None
        return LatentAttention(
            heads=f.num_attention_heads,
            q_lora_rank=latent.q_lora_rank,
            kv_lora_rank=latent.kv_lora_rank,
            qk_nope_head_dim=latent.qk_nope_head_dim,
            qk_rope_head_dim=latent.qk_rope_head_dim,
            v_head_dim=latent.v_head_dim,
            rotary=rotary,
            norm_epsilon=latent.norm_epsilon,
            scale=f.attention_scale,
            dropout=f.attention_dropout,
        )
    return Attention(
        heads=f.num_attention_heads,
        groups=f.num_query_groups,
        head_dim=f.head_dim,
        rotary=rotary,
        alibi=Alibi(bias_max=f.alibi_bias_max, rounded=f.alibi == "rounded") if f.positions == "alibi" else None,
        window=window,
        bias=f.qkv_bias,
        output_bias=f.attention_output_bias,
        qk_norm=f.qk_norm_scope if f.qk_norm else None,
        gate=f.attention_gate,
        clip=f.qkv_clip,
        scale=f.attention_scale,
        scale_by_layer=f.attention_scale_by_layer,
        softcap=f.attention_softcap,
        sinks=f.attention_sinks,
        dropout=f.attention_dropout,
    )
