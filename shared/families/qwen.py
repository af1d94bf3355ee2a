"""Qwen 1: LLaMA with fused QKV `[q ; k ; v]` with bias; `w2` is gate, `w1` up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.families.common.decoder import Spelling, mlp_of, read_decoder, rotary_of, write_decoder
from shared.families.common.fields import Fields, renamed
from shared.families.common.tensor_table import Names
from shared.families.family import Family

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

# Fields of precision, runtime and training framework.
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


def without_legacy_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Legacy names and defaults of the first Qwen-7B."""
    if "n_embd" not in config:
        return config
    defaults = {"use_dynamic_ntk": False, "use_logn_attn": False, "layer_norm_epsilon": 1e-5}
    return defaults | renamed(config, _FIRST)


_SPELLING = Spelling(
    groups=None,
    head_dim=None,
    epsilon="layer_norm_epsilon",
    activation=None,
    attention_dropout="attn_dropout_prob",
    embedding_dropout="emb_dropout_prob",
)


def read(fields: Fields) -> Architecture:
    """`intermediate_size` counts gate and up together.

    `use_dynamic_ntk` and `use_logn_attn` change inference, not training, beyond `seq_length` tokens: with them the model's
    max_position_embeddings is seq_length.
    """
    fields.expect("quantization_config", why="the weights are quantised; fetch the unquantised model")
    fields.ignore(*_OTHERS.split())
    fields.expect("pos_emb", "rotary", why="this family has RoPE")
    fields.expect("activation", "swiglu", why="this family has SwiGLU")
    fields.expect(
        "apply_residual_connection_post_layernorm", False, why="only residuals of the layer input are supported"
    )
    decoder = read_decoder(fields, _SPELLING, rotary=False, default_positions=8192, dropout=0.0)
    vocabulary, head_dim, positions = decoder.vocab_size, decoder.head_dim, decoder.max_position_embeddings
    fields.expect("padded_vocab_size", vocabulary, why=f"vocab_size says {vocabulary}")
    fields.expect("kv_channels", head_dim, why="it must equal hidden_size / num_attention_heads")
    theta, fraction = fields.get("rotary_emb_base", float, 10_000.0), fields.get("rotary_pct", float, 1.0)
    fields.expect("rope_theta", theta, why="it must equal rotary_emb_base")
    by_length = [fields.get(name, bool, True) for name in ("use_dynamic_ntk", "use_logn_attn")]
    trained = fields.get("seq_length", int, positions)
    bias = not fields.get("no_bias", bool, True)
    rotary = Rotary(theta=theta, dim=None if fraction == 1.0 else int(head_dim * fraction))
    return replace(decoder, max_position_embeddings=min(trained, positions) if any(by_length) else positions).build(
        "qwen",
        attention={"rotary": rotary, "bias": True, "output_bias": bias},
        mlp={"ffn_hidden_size": decoder.mlp["ffn_hidden_size"] // 2, "bias": bias},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "intermediate_size": 2 * mlp_of(a).ffn_hidden_size,
        "kv_channels": a.attention.head_dim,
        "seq_length": a.max_position_embeddings,
        "no_bias": not mlp_of(a).bias,
        "rotary_emb_base": rotary_of(a).theta,
        "rotary_pct": a.attention.rotary_dim / a.attention.head_dim,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


_QWEN_1_8B = {
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_attention_heads": 16,
    "vocab_size": 151_936,
}

FAMILY = Family(
    name="qwen",
    title="Qwen 1",
    hf_class="QWenLMHeadModel",
    remote=True,
    without_legacy_names=without_legacy_names,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "qwen-tiny": {
            **_QWEN_1_8B,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 320,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "seq_length": 512,
        },
        "qwen-1.8b": _QWEN_1_8B,
        "qwen-7b": {
            **_QWEN_1_8B,
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 22_016,
            "num_attention_heads": 32,
        },
        "qwen-14b": {
            **_QWEN_1_8B,
            "num_hidden_layers": 40,
            "hidden_size": 5120,
            "intermediate_size": 27_392,
            "num_attention_heads": 40,
            "vocab_size": 152_064,
            "seq_length": 2048,
        },
        "qwen-72b": {
            **_QWEN_1_8B,
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "intermediate_size": 49_152,
            "num_attention_heads": 64,
            "vocab_size": 152_064,
            "max_position_embeddings": 32_768,
            "rotary_emb_base": 1_000_000.0,
        },
    },
)
