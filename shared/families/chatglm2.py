"""ChatGLM2, ChatGLM3 and GLM-4-9B with remote code: interleaved RoPE on half of each head."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.errors import UserError
from shared.families.common.decoder import Spelling, attention_of, mlp_of, read_decoder, rotary_of, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family
from shared.mapping.rule import PassThroughTensor, Table

_NAMES = Names(
    embedding="transformer.embedding.word_embeddings",
    layer="transformer.encoder.layers.{layer}.",
    qkv=("self_attention.query_key_value",),
    proj="self_attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
    pass_through=(),
)
# A buffer that every implementation recomputes.
_FREQUENCIES = PassThroughTensor(name="transformer.rotary_pos_emb.inv_freq", axes=())
_THETA = 10_000.0  # times rope_ratio

_SPELLING = Spelling(
    layers="num_layers",
    ffn="ffn_hidden_size",
    groups=None,
    head_dim="kv_channels",
    vocab="padded_vocab_size",
    positions="seq_length",
    epsilon="layernorm_epsilon",
    activation=None,
    tied=None,
    initializer_range=None,
)
# Fields with one supported value: (value, reason).
_FIXED = {
    "rmsnorm": (True, "only RMSNorm is supported"),
    "post_layer_norm": (True, "the final norm is required"),
    "apply_residual_connection_post_layernorm": (False, "only residuals of the layer input are supported"),
    "fp32_residual_connection": (False, "fp32 residuals are not supported"),
    "original_rope": (True, "only interleaved RoPE pairs are supported"),
    "rotary_percent": (0.5, "RoPE covers half of each head"),
    "interleaved_qkv": (False, "only QKV rows in the order q, k, v are supported"),
    "tie_word_embeddings": (False, "tied embeddings are not supported for this family"),
}
_WRITTEN = [name for name in _FIXED if name not in ("rotary_percent", "interleaved_qkv")]


def read(fields: Fields) -> Architecture:
    """theta = 10000 * `rope_ratio`; `add_bias_linear` adds biases to every linear layer."""
    fields.expect("quantization_bit", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("vision_config", why="multimodal models of this family are not supported")
    fields.expect("pre_seq_len", why="P-tuning (prefix tuning) is not supported")
    for name, (expected, why) in _FIXED.items():
        fields.expect(name, expected, why=why)
    if not fields.get("multi_query_attention", bool, False):
        raise UserError("config.json: multi_query_attention must be true; no published model has another value")
    # Numerical range only: scores are divided by the layer number, then multiplied by it in fp32.
    fields.ignore("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion")
    fields.ignore("prefix_projection", "classifier_dropout")
    decoder = read_decoder(fields, _SPELLING, rotary=False, default_epsilon=1e-5)
    layers, vocabulary = decoder.num_layers, decoder.vocab_size
    fields.expect("num_hidden_layers", layers, why=f"num_layers says {layers}")
    fields.expect("vocab_size", vocabulary, why=f"padded_vocab_size says {vocabulary}")
    theta, biases = _THETA * fields.get("rope_ratio", float, 1.0), fields.get("add_bias_linear", bool, False)
    return decoder.build(
        "chatglm2",
        attention={
            "groups": fields.get("multi_query_group_num", int, 1),
            "rotary": Rotary(theta=theta, dim=decoder.head_dim // 2, interleaved=True),
            "bias": fields.get("add_qkv_bias", bool, False) or biases,
            "output_bias": biases,
        },
        mlp={"bias": biases},
    )


def write(a: Architecture) -> dict[str, Any]:
    ratio = rotary_of(a).theta / _THETA
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "num_hidden_layers": a.num_layers,
        "multi_query_attention": True,
        "multi_query_group_num": a.attention.groups,
        "vocab_size": a.vocab_size,
        "rope_ratio": int(ratio) if ratio.is_integer() else ratio,
        "add_bias_linear": mlp_of(a).bias,
        "add_qkv_bias": attention_of(a).bias,
        **{name: _FIXED[name][0] for name in _WRITTEN},
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "hidden_dropout": 0.0,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES, (_FREQUENCIES,))


_CHATGLM3_6B = {
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13_696,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65_024,
    "seq_length": 8192,
    "add_qkv_bias": True,
}
_CHATGLM2_TINY = {
    **_CHATGLM3_6B,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "padded_vocab_size": 512,
    "seq_length": 512,
    "rope_ratio": 50,
}

FAMILY = Family(
    name="chatglm2",
    title="ChatGLM2, ChatGLM3, CodeGeeX2, GLM-4-9B as first published",
    hf_class="ChatGLMForConditionalGeneration",
    other_classes=("ChatGLMModel",),
    remote=True,
    model_types=("chatglm",),
    matches=lambda config: "padded_vocab_size" in config,
    read=read,
    own_table=table,
    write=write,
    size_configs={
        "chatglm2-tiny": _CHATGLM2_TINY,
        "chatglm2-tiny-bias": {**_CHATGLM2_TINY, "rope_ratio": 1, "add_bias_linear": True},
        "chatglm3-6b": _CHATGLM3_6B,
    },
)
