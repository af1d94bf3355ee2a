"""GPT-NeoX and Pythia: attention and MLP side by side on a norm each, a quarter of each head rotated."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import GELU, activation, gelu_name, rotary_dim, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="gpt_neox.embed_in",
    layer="gpt_neox.layers.{layer}.",
    qkv=("attention.query_key_value",),
    fused="groups",
    proj="attention.dense",
    fc1=("mlp.dense_h_to_4h",),
    fc2="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    pass_through=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)


def read(fields: Fields) -> Architecture:
    """`rotary_pct` and `rotary_emb_base` are transformers 4's names of the rotary fields."""
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):  # the 20B's names, read by no class
        fields.expect(name, 0, 0.0, why="dropout is in attention_dropout and hidden_dropout")
    fields.ignore("classifier_dropout", "rotary_pct", "rotary_emb_base", "partial_rotary_factor")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    positions = fields.get("max_position_embeddings", int)
    theta, scaling = fields.rope(fields.get("rotary_emb_base", float, 10_000.0), positions, partial=True)
    bias = fields.get("attention_bias", bool, True)
    return nested(
        family="gpt_neox",
        num_layers=fields.get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=positions,
        norm="layernorm",
        norm_bias=True,
        norm_epsilon=fields.get("layer_norm_eps", float, 1e-5),
        residual="parallel" if fields.get("use_parallel_residual", bool, True) else "sequential",
        activation=activation(fields, "hidden_act", GELU, "gelu"),
        mlp_bias=True,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim(fields, hidden // heads, 0.25, "rotary_pct"),
        qkv_bias=bias,
        attention_output_bias=bias,
        attention_dropout=fields.get("attention_dropout", float, 0.0),
        hidden_dropout=fields.get("hidden_dropout", float, 0.0),
        embedding_dropout=fields.get("hidden_dropout", float, 0.0),
        tied_embeddings=fields.get("tie_word_embeddings", bool, False),
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = written_fields(a, epsilon="layer_norm_eps", activation=gelu_name(a), partial=True)
    for name in ("head_dim", "num_key_value_heads", "partial_rotary_factor", "rope_theta"):
        del fields[name]
    return {
        **fields,
        "rotary_pct": a.rotated / a.head_dim,
        "rotary_emb_base": a.rope_theta,
        "use_parallel_residual": a.residual == "parallel",
        "attention_bias": a.qkv_bias,
        "hidden_dropout": a.hidden_dropout,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_PYTHIA_1_4B = nested(
    family="gpt_neox",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=128,
    vocab_size=50_304,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    residual="parallel",
    activation="gelu",
    rotary_dim=32,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    tied_embeddings=False,
)
_TINY = tiny(_PYTHIA_1_4B, num_query_groups=4, rotary_dim=4)

FAMILY = Family(
    name="gpt_neox",
    title="GPT-NeoX-20B, Pythia",
    hf_class="GPTNeoXForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={
        "gpt-neox-tiny": _TINY,
        "gpt-neox-tiny-sequential": replace(_TINY, residual="sequential"),
        "pythia-1.4b": _PYTHIA_1_4B,
        "gpt-neox-20b": replace(
            _PYTHIA_1_4B,
            num_layers=44,
            hidden_size=6144,
            ffn_hidden_size=24_576,
            num_attention_heads=64,
            num_query_groups=64,
            head_dim=96,
            vocab_size=50_432,
            rotary_dim=24,
            activation="gelu_tanh",
        ),
    },
)
