"""The pre-norm decoder with RMSNorm, rotary embedding and SwiGLU that LLaMA made common: fields and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.families.fields import Fields, rope_fields
from shared.mapping.layout import CONCAT, Interleave, PadRows
from shared.mapping.rule import Alias, Aside, Rule, Source, Table
from shared.model.architecture import Architecture


def common_fields(fields: Fields, *, default_theta: float = 10_000.0) -> dict[str, Any]:
    """The fields of an Architecture that all of these families spell alike.

    Defaults are those of the transformers classes, for fields that their files may leave out.
    """
    fields.expect("hidden_act", "silu", "swish", why="SwiGLU with silu is what this family computes")
    fields.expect("attention_dropout", 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.expect("quantization_config", why="the weights are quantised; fetch the unquantised model")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    positions = fields.get("max_position_embeddings", int)
    theta, scaling = fields.rope(default_theta, positions)
    return {
        "num_layers": fields.get("num_hidden_layers", int),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.get("intermediate_size", int),
        "num_attention_heads": heads,
        "num_query_groups": fields.get("num_key_value_heads", int, heads),
        "head_dim": fields.get("head_dim", int, hidden // heads),
        "vocab_size": fields.get("vocab_size", int),
        "max_position_embeddings": positions,
        "norm_epsilon": fields.get("rms_norm_eps", float, 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_embeddings": fields.get("tie_word_embeddings", bool, False),
        "initializer_range": fields.get("initializer_range", float, 0.02),
    }


def full_attention_only(fields: Fields, num_layers: int) -> None:
    """Qwen's sliding windows: present in the files, off in every released dense model."""
    fields.expect("use_sliding_window", False, why="sliding-window attention is not computed here")
    fields.expect("layer_types", ["full_attention"] * num_layers, why="only full attention is computed here")
    fields.ignore("sliding_window", "max_window_layers")  # without effect while use_sliding_window is false


def written_fields(a: Architecture) -> dict[str, Any]:
    """`common_fields` backwards."""
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_embeddings,
        "attention_dropout": a.attention_dropout,
        "initializer_range": a.initializer_range,
        **rope_fields(a.rope_theta, a.rope_scaling),
    }


def table(a: Architecture) -> Table:
    """Tensors of the decoder; biases and head norms as the architecture has them."""
    return Table(
        rules=tuple(_rules(a)),
        aliases=(Alias(name="lm_head.weight", of="model.embed_tokens.weight"),) if a.tied_embeddings else (),
        # A constant that LLaMA 1 and 2 files of old transformers versions hold; every implementation recomputes it.
        asides=(Aside(name="model.layers.{layer}.self_attn.rotary_emb.inv_freq"),),
        sizes={"layer": a.num_layers},
    )


def _rules(a: Architecture) -> Iterator[Rule]:
    attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
    hidden, ffn, q, kv = a.hidden_size, a.ffn_hidden_size, a.q_size, a.kv_size
    groups = Interleave(groups=a.num_query_groups)  # [q1..qn k1 v1 | q.. k2 v2 | ...]
    vocabulary = PadRows(rows=a.padded_vocab_size())

    def layer(key: str, *sources: tuple[str, tuple[int, ...]], layout: Interleave = CONCAT) -> Rule:
        named = tuple(Source(name=f"model.layers.{{layer}}.{name}", shape=shape) for name, shape in sources)
        return Rule(megatron=key, axes=("layer",), sources=named, layout=layout)

    def whole(key: str, name: str, shape: tuple[int, ...], layout: PadRows | Interleave = CONCAT) -> Rule:
        return Rule(megatron=key, sources=(Source(name=name, shape=shape),), layout=layout)

    yield whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", (a.vocab_size, hidden), vocabulary)
    yield layer(f"{attention}.linear_qkv.layer_norm_weight", ("input_layernorm.weight", (hidden,)))
    yield layer(
        f"{attention}.linear_qkv.weight",
        ("self_attn.q_proj.weight", (q, hidden)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.v_proj.weight", (kv, hidden)),
        layout=groups,
    )
    if a.qkv_bias:
        yield layer(
            f"{attention}.linear_qkv.bias",
            ("self_attn.q_proj.bias", (q,)),
            ("self_attn.k_proj.bias", (kv,)),
            ("self_attn.v_proj.bias", (kv,)),
            layout=groups,
        )
    if a.qk_norm:
        yield layer(f"{attention}.q_layernorm.weight", ("self_attn.q_norm.weight", (a.head_dim,)))
        yield layer(f"{attention}.k_layernorm.weight", ("self_attn.k_norm.weight", (a.head_dim,)))
    yield layer(f"{attention}.linear_proj.weight", ("self_attn.o_proj.weight", (hidden, q)))
    if a.attention_output_bias:
        yield layer(f"{attention}.linear_proj.bias", ("self_attn.o_proj.bias", (hidden,)))
    yield layer(f"{mlp}.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight", (hidden,)))
    yield layer(
        f"{mlp}.linear_fc1.weight", ("mlp.gate_proj.weight", (ffn, hidden)), ("mlp.up_proj.weight", (ffn, hidden))
    )
    if a.mlp_bias:
        yield layer(f"{mlp}.linear_fc1.bias", ("mlp.gate_proj.bias", (ffn,)), ("mlp.up_proj.bias", (ffn,)))
    yield layer(f"{mlp}.linear_fc2.weight", ("mlp.down_proj.weight", (hidden, ffn)))
    if a.mlp_bias:
        yield layer(f"{mlp}.linear_fc2.bias", ("mlp.down_proj.bias", (hidden,)))
    yield whole("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not a.tied_embeddings:
        yield whole("output_layer.weight", "lm_head.weight", (a.vocab_size, hidden), vocabulary)
