"""Qwen 1: LLaMA with one projection for queries, keys and values, with a bias; `w2` is the gate and `w1` is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.fields import Fields, renamed
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="transformer.wte",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    fc1=("mlp.w2", "mlp.w1"),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    pass_through=("attn.rotary_emb.inv_freq", "attn.masked_bias"),
)

# Of precision, of the programs that run the model, and of the one that trained it.
_OTHERS = """
    bf16 bias_dropout_fusion fp16 fp32 onnx_safe params_dtype resid_pdrop scale_attn_weights softmax_in_fp32 tokenizer_type
    use_cache_kernel use_cache_quantization use_flash_attn
"""
_FIRST = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}


def today(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of Qwen-7B as it came out, whose code had other defaults as well."""
    if "n_embd" not in config:
        return config
    defaults = {"use_dynamic_ntk": False, "use_logn_attn": False, "layer_norm_epsilon": 1e-5}
    return defaults | renamed(config, _FIRST)


def read(fields: Fields) -> Architecture:
    """`intermediate_size` is that of gate and up together.

    `use_dynamic_ntk` and `use_logn_attn` change frequencies and queries in inference, though not in training, of
    sequences longer than `seq_length`, so that the model ends there; without them it ends at
    `max_position_embeddings`.
    """
    fields.expect("quantization_config", why="the weights are quantised; fetch the unquantised model")
    fields.ignore(*_OTHERS.split())
    fields.expect("pos_emb", "rotary", why="positions are rotary")
    fields.expect("activation", "swiglu", why="the MLP is a SwiGLU")
    fields.expect("apply_residual_connection_post_layernorm", False, why="the residual is the layer's input")
    vocabulary = fields.get("vocab_size", int)
    fields.expect("padded_vocab_size", vocabulary, why=f"vocab_size says {vocabulary}")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    fields.expect("kv_channels", hidden // heads, why="heads are hidden_size / num_attention_heads wide")
    theta, fraction = fields.get("rotary_emb_base", float, 10_000.0), fields.get("rotary_pct", float, 1.0)
    fields.expect("rope_theta", theta, why="the rotary base is rotary_emb_base, which contradicts it")
    positions = fields.get("max_position_embeddings", int, 8192)
    by_length = [fields.get(name, bool, True) for name in ("use_dynamic_ntk", "use_logn_attn")]
    trained = fields.get("seq_length", int, positions)
    bias = not fields.get("no_bias", bool, True)
    return nested(
        family="qwen",
        num_layers=fields.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("intermediate_size", int) // 2,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=min(trained, positions) if any(by_length) else positions,
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-6),
        mlp_bias=bias,
        rope_theta=theta,
        rotary_dim=None if fraction == 1.0 else int(hidden // heads * fraction),
        qkv_bias=True,
        attention_output_bias=bias,
        tied_embeddings=fields.get("tie_word_embeddings", bool, False),
        initializer_range=fields.get("initializer_range", float, 0.02),
        attention_dropout=fields.get("attn_dropout_prob", float, 0.0),
        embedding_dropout=fields.get("emb_dropout_prob", float, 0.0),
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": 2 * a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "kv_channels": a.head_dim,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "seq_length": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
        "no_bias": not a.mlp_bias,
        "rotary_emb_base": a.rope_theta,
        "rotary_pct": a.rotated / a.head_dim,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
        "attn_dropout_prob": a.attention_dropout,
        "emb_dropout_prob": a.embedding_dropout,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_QWEN_7B = nested(
    family="qwen",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=8192,
    norm_epsilon=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
)
_TINY = tiny(_QWEN_7B, num_query_groups=4)

FAMILY = Family(
    name="qwen",
    title="Qwen 1",
    hf_class="QWenLMHeadModel",
    remote=True,
    today=today,
    read=read,
    table=table,
    write=write,
    sizes={
        "qwen-tiny": _TINY,
        "qwen-1.8b": replace(
            _QWEN_7B,
            num_layers=24,
            hidden_size=2048,
            ffn_hidden_size=5504,
            num_attention_heads=16,
            num_query_groups=16,
        ),
        "qwen-7b": _QWEN_7B,
        "qwen-14b": replace(
            _QWEN_7B,
            num_layers=40,
            hidden_size=5120,
            ffn_hidden_size=13_696,
            num_attention_heads=40,
            num_query_groups=40,
            vocab_size=152_064,
            max_position_embeddings=2048,
        ),
        "qwen-72b": replace(
            _QWEN_7B,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=24_576,
            num_attention_heads=64,
            num_query_groups=64,
            vocab_size=152_064,
            max_position_embeddings=32_768,
            rope_theta=1_000_000.0,
        ),
    },
)
