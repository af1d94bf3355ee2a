"""StarCoder2: LayerNorm and biases throughout, an MLP without a gate, a sliding window."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import GELU, common_fields, gelu_name, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(fc1=("mlp.c_fc",), fc2="mlp.c_proj")


def read(fields: Fields) -> Architecture:
    """`use_bias` is on every linear layer; the norms always have one."""
    bias = fields.get("use_bias", bool, True)
    fields.expect("norm_type", "layer_norm", why="this family has LayerNorm")
    fields.expect("mlp_type", "default", why="this family's MLP has no gate")
    fields.expect("scale_attn_weights", True, why="scores are scaled by 1 / sqrt(head_dim)")
    # Left over in the 7B's file from gpt_bigcode; transformers reads none of them.
    fields.ignore("activation_function", "layer_norm_epsilon")
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    return nested(
        family="starcoder2",
        norm="layernorm",
        norm_bias=True,
        sliding_window=fields.optional("sliding_window", int),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        attention_dropout=fields.get("attention_dropout", float, 0.0),
        hidden_dropout=fields.get("residual_dropout", float, 0.0),
        embedding_dropout=fields.get("embedding_dropout", float, 0.0),
        **common_fields(
            fields,
            dropout=True,
            epsilon="norm_epsilon",
            default_epsilon=1e-5,
            activations=GELU,
            default_activation="gelu_pytorch_tanh",
            tied=True,
            initializer_range=0.018042,
        ),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a, epsilon="norm_epsilon", activation=gelu_name(a))
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return {
        **fields,
        "use_bias": a.qkv_bias,
        "sliding_window": a.sliding_window,
        "residual_dropout": a.hidden_dropout,
        "embedding_dropout": a.embedding_dropout,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_STARCODER2_7B = nested(
    family="starcoder2",
    num_layers=32,
    hidden_size=4608,
    ffn_hidden_size=18_432,
    num_attention_heads=36,
    num_query_groups=4,
    head_dim=128,
    vocab_size=49_152,
    max_position_embeddings=16_384,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    rope_theta=1_000_000.0,
    sliding_window=4096,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    tied_embeddings=True,
    initializer_range=0.018042,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    embedding_dropout=0.1,
)

FAMILY = Family(
    name="starcoder2",
    title="StarCoder2",
    hf_class="Starcoder2ForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "starcoder2-tiny": tiny(
            _STARCODER2_7B, sliding_window=96, attention_dropout=0.0, hidden_dropout=0.0, embedding_dropout=0.0
        ),
        "starcoder2-3b": replace(
            _STARCODER2_7B,
            num_layers=30,
            hidden_size=3072,
            ffn_hidden_size=12_288,
            num_attention_heads=24,
            num_query_groups=2,
            rope_theta=999_999.4420358813,
        ),
        "starcoder2-7b": _STARCODER2_7B,
    },
)
