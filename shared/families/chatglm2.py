"""ChatGLM2, ChatGLM3 and GLM-4-9B as their makers publish them: neighbours rotated in half of each head."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
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
# A constant of the whole model, which every implementation recomputes.
_FREQUENCIES = PassThroughTensor(name="transformer.rotary_pos_emb.inv_freq", axes=())
_THETA = 10_000.0  # times rope_ratio


def read(fields: Fields) -> Architecture:
    """`rope_ratio` multiplies the base of the rotation; `add_bias_linear` adds biases to every linear layer."""
    fields.expect("quantization_bit", 0, why="the weights are quantised; fetch the unquantised model")
    fields.expect("vision_config", why="its images are not computed here")
    fields.expect("pre_seq_len", why="a prefix of tuned keys and values (P-tuning) is not computed here")
    fields.expect("rmsnorm", True, why="norms are RMSNorm")
    fields.expect("post_layer_norm", True, why="the last layer is followed by a norm")
    fields.expect("apply_residual_connection_post_layernorm", False, why="the residual is the layer's input")
    fields.expect("fp32_residual_connection", False, why="the residual has the weights' type")
    fields.expect("original_rope", True, why="pairs of the rotation are neighbours")
    fields.expect("rotary_percent", 0.5, why="half of each head is rotated")
    fields.expect("interleaved_qkv", False, why="queries come before keys, and keys before values")
    fields.expect("tie_word_embeddings", False, why="the output layer is stored")
    for name in ("attention_dropout", "hidden_dropout"):
        fields.expect(name, 0, 0.0, why="train without dropout, or set it to 0.0")
    if not fields.get("multi_query_attention", bool, False):
        raise UserError("config.json: multi_query_attention other than true is not supported: no such model is known")
    # Precision alone: scores are divided by the layer's number and multiplied with it again, in fp32.
    fields.ignore("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion")
    fields.ignore("prefix_projection", "classifier_dropout")
    layers, vocabulary = fields.get("num_layers", int), fields.get("padded_vocab_size", int)
    fields.expect("num_hidden_layers", layers, why=f"num_layers says {layers}")
    fields.expect("vocab_size", vocabulary, why=f"padded_vocab_size says {vocabulary}")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    head_dim = fields.get("kv_channels", int, hidden // heads)
    biases = fields.get("add_bias_linear", bool, False)
    return nested(
        family="chatglm2",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=fields.get("ffn_hidden_size", int),
        num_attention_heads=heads,
        num_query_groups=fields.get("multi_query_group_num", int, 1),
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=fields.get("seq_length", int),
        norm_epsilon=fields.get("layernorm_epsilon", float, 1e-5),
        mlp_bias=biases,
        rope_theta=_THETA * fields.get("rope_ratio", float, 1.0),
        rotary_dim=head_dim // 2,
        rotary_interleaved=True,
        qkv_bias=fields.get("add_qkv_bias", bool, False) or biases,
        attention_output_bias=biases,
        tied_embeddings=False,
    )


def write(a: Architecture) -> dict[str, Any]:
    ratio = a.rope_theta / _THETA
    return {
        "num_layers": a.num_layers,
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "multi_query_attention": True,
        "multi_query_group_num": a.num_query_groups,
        "kv_channels": a.head_dim,
        "padded_vocab_size": a.vocab_size,
        "vocab_size": a.vocab_size,
        "seq_length": a.max_position_embeddings,
        "layernorm_epsilon": a.norm_epsilon,
        "rope_ratio": int(ratio) if ratio.is_integer() else ratio,
        "add_bias_linear": a.mlp_bias,
        "add_qkv_bias": a.qkv_bias,
        "rmsnorm": True,
        "post_layer_norm": True,
        "original_rope": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES, (_FREQUENCIES,))


_CHATGLM3_6B = nested(
    family="chatglm2",
    num_layers=28,
    hidden_size=4096,
    ffn_hidden_size=13_696,
    num_attention_heads=32,
    num_query_groups=2,
    head_dim=128,
    vocab_size=65_024,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    rotary_dim=64,
    rotary_interleaved=True,
    qkv_bias=True,
    tied_embeddings=False,
)
_TINY = tiny(_CHATGLM3_6B, rotary_dim=8)

FAMILY = Family(
    name="chatglm2",
    title="ChatGLM2, ChatGLM3, CodeGeeX2, GLM-4-9B as first published",
    hf_class="ChatGLMForConditionalGeneration",
    other_classes=("ChatGLMModel",),
    remote=True,
    model_types=("chatglm",),
    claims=lambda config: "padded_vocab_size" in config,
    read=read,
    table=table,
    write=write,
    sizes={
        "chatglm2-tiny": replace(_TINY, rope_theta=500_000.0),
        "chatglm2-tiny-bias": replace(_TINY, attention_output_bias=True, mlp_bias=True),
        "chatglm3-6b": _CHATGLM3_6B,
    },
)
