"""Transitional: version 1's fields of a nested Architecture, until every reader reads the values."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shared.architecture import version_1
from shared.architecture.attention import Attention, GatedDeltaNet, LatentAttention, Rotary
from shared.architecture.mlp import GATED, MLP, MoE

if TYPE_CHECKING:
    from shared.architecture.architecture import Architecture


def flat(a: Architecture) -> version_1.Flat:
    """Version 1's fields."""
    attention, moe, mlp, net, norm = a.attention, a.moe, a.mlp, a.delta_net, a.layers[0].norm
    mixers = [layer.mixer for layer in a.layers]
    rotaries: list[Rotary | None] = [m.rotary for m in mixers if isinstance(m, Attention | LatentAttention)]
    windowed = [m for m in mixers if isinstance(m, Attention) and m.window is not None]
    unwindowed = [m.rotary for m in mixers if not isinstance(m, GatedDeltaNet) and getattr(m, "window", None) is None]
    full_rotary = next((r for r in [*unwindowed, *rotaries] if r), None)
    window_rotary = next((m.rotary for m in windowed if m.rotary), None)
    positions = "rope" if full_rotary else "learned" if a.embedding.positions else "rope"
    if isinstance(attention, Attention) and attention.alibi:
        positions = "alibi"
    rotary = full_rotary or Rotary()
    some_mlp = mlp or moe.expert  # type: ignore[union-attr]
    plain = attention if isinstance(attention, Attention) else None
    residual = a.layers[0].residual
    alibi = plain.alibi if plain else None
    return version_1.Flat(
        family=a.family,
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=mlp.ffn_hidden_size if mlp else a.unused_ffn_hidden_size or 0,
        num_attention_heads=attention.heads,
        num_query_groups=attention.groups,
        head_dim=attention.head_dim,
        vocab_size=a.vocab_size,
        max_position_embeddings=a.max_position_embeddings,
        tied_embeddings=a.head.tied,
        initializer_range=a.initializer_range,
        norm="layernorm" if norm.kind == "layernorm" else "rmsnorm_1p" if norm.zero_centered_gamma else "rmsnorm",
        norm_bias=norm.bias,
        norm_epsilon=norm.epsilon,
        norm_affine=norm.affine,
        norm_placement=a.layers[0].norm_placement,
        final_norm=a.head.norm is not None,
        embedding_norm=a.embedding.norm is not None,
        embedding_size=a.embedding.factorised_size,
        residual=residual.kind,
        activation=some_mlp.activation,
        glu_limit=some_mlp.clamp,
        glu_offset=some_mlp.up_offset,
        mlp_bias=mlp.bias if mlp else False,
        experts=_experts(a, moe) if moe else None,
        prediction_layers=a.mtp.depth if a.mtp else 0,
        positions=positions,  # type: ignore[arg-type]
        position_streams=a.prefix.position_streams if a.prefix else 1,
        alibi="rounded" if alibi and alibi.rounded else "exact",
        alibi_bias_max=alibi.bias_max if alibi else 8,
        learned_position_offset=a.embedding.positions.offset if a.embedding.positions else 0,
        rope_theta=rotary.theta,
        rope_scaling=rotary.scaling,
        window_rope_theta=window_rotary.theta
        if window_rotary and full_rotary and window_rotary != full_rotary
        else None,
        rotary_dim=rotary.dim,
        rotary_fp16=rotary.fp16_frequencies,
        rotary_interleaved=rotary.interleaved,
        layers_without_rope=tuple(
            i for i, m in enumerate(mixers) if isinstance(m, Attention) and m.rotary is None and positions == "rope"
        ),
        prefix=version_1.Prefix(
            start_token=a.prefix.start_token,
            blank_tokens=a.prefix.blank_tokens,
            counted_tokens=a.prefix.counted_tokens,
            earliest=a.prefix.earliest,
        )
        if a.prefix
        else None,
        latent=version_1.Latent(
            q_lora_rank=attention.q_lora_rank,
            kv_lora_rank=attention.kv_lora_rank,
            qk_nope_head_dim=attention.qk_nope_head_dim,
            qk_rope_head_dim=attention.qk_rope_head_dim,
            v_head_dim=attention.v_head_dim,
            norm_epsilon=attention.norm_epsilon,
        )
        if isinstance(attention, LatentAttention)
        else None,
        delta=version_1.Delta(
            layers=a.layers_of(GatedDeltaNet),
            key_heads=net.key_heads,
            value_heads=net.value_heads,
            key_head_dim=net.key_head_dim,
            value_head_dim=net.value_head_dim,
            conv_kernel=net.conv_kernel,
        )
        if net
        else None,
        attention_gate=plain.gate if plain else False,
        qkv_bias=plain.bias if plain else False,
        qkv_clip=plain.clip if plain else None,
        attention_output_bias=plain.output_bias if plain else False,
        qk_norm=bool(plain and plain.qk_norm),
        qk_norm_scope=(plain.qk_norm if plain else None) or "head",
        attention_scale=attention.scale,
        attention_scale_by_layer=plain.scale_by_layer if plain else False,
        attention_softcap=plain.softcap if plain else None,
        attention_sinks=plain.sinks if plain else False,
        sliding_window=windowed[0].window if windowed else None,
        full_attention_layers=tuple(i for i, m in enumerate(mixers) if isinstance(m, Attention) and m.window is None)
        if windowed
        else (),
        embedding_multiplier=a.embedding.multiplier,
        residual_multiplier=residual.multiplier,
        input_multiplier=residual.input_multiplier,
        logit_multiplier=a.head.multiplier,
        logit_softcap=a.head.softcap,
        output_bias=a.head.bias,
        normalized_head=a.head.normalized,
        attention_dropout=attention.dropout,
        hidden_dropout=residual.dropout,
        embedding_dropout=a.embedding.dropout,
        vision=a.vision,
    )


def _experts(a: Architecture, moe: MoE) -> version_1.Experts:
    return version_1.Experts(
        count=moe.experts,
        top_k=moe.top_k,
        ffn_hidden_size=moe.expert.ffn_hidden_size,
        bias=moe.router_bias,
        score=moe.score,
        normalized=moe.normalized,
        scaling=moe.scaling,
        correction_bias=moe.correction_bias,
        groups=moe.groups,
        top_groups=moe.top_groups,
        group_score_of=moe.group_score_top,
        shared_ffn_hidden_size=moe.shared.ffn_hidden_size if moe.shared else None,
        shared_gate=moe.shared_gate,
        auxiliary_loss=moe.auxiliary_loss,
        auxiliary_loss_of=moe.auxiliary_loss_over,
        dense_layers=a.layers_of(MLP),
    )


def changed(value: Any, **changes: Any) -> Any:
    """`dataclasses.replace`, of an Architecture by version 1's fields."""
    from shared.architecture.architecture import Architecture

    if not isinstance(value, Architecture):
        return dataclasses.replace(value, **changes)
    own = {field.name for field in dataclasses.fields(value)}
    if not changes.keys() - own and not isinstance(changes.get("prefix"), version_1.Prefix):
        return dataclasses.replace(value, **changes)
    f = value.flat
    return version_1.nested(**{field.name: getattr(f, field.name) for field in dataclasses.fields(f)} | changes)


class FlatView:
    """Version 1's names of what an Architecture has no name for any more."""

    layers_of: Any
    mtp_decoder: Any
    attention: Any
    if TYPE_CHECKING:

        @property
        def num_layers(self) -> int: ...

        @property
        def position_rows(self) -> int: ...

    mtp_parameter_count: Any

    @cached_property
    def flat(self) -> version_1.Flat:
        return flat(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name in version_1.Flat.__dataclass_fields__:
            return getattr(self.flat, name)
        raise AttributeError(name)

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def norms_in_front(self) -> bool:
        return self.norm_placement in ("pre", "sandwich")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.layers_of(MoE)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.layers_of(GatedDeltaNet))

    @property
    def prediction_layer(self) -> Any:
        return self.mtp_decoder

    @property
    def rotated(self) -> int:
        return self.attention.rotary_dim

    def window(self, layer: int) -> int | None:
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def q_size(self) -> int:
        return self.attention.q_size

    @property
    def kv_size(self) -> int:
        return self.attention.kv_size

    @property
    def attended_size(self) -> int:
        return self.attention.output_size

    @property
    def learned_positions(self) -> int:
        return self.position_rows

    def prediction_count(self, *, active: bool = False) -> int:
        return self.mtp_parameter_count(active=active)
