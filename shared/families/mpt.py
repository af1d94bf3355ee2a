"""MPT: ALiBi, no biases anywhere, norms included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="transformer.wte",
    layer="transformer.blocks.{layer}.",
    attention_norm="norm_1",
    mlp_norm="norm_2",
    qkv=("attn.Wqkv",),
    proj="attn.out_proj",
    fc1=("ffn.up_proj",),
    fc2="ffn.down_proj",
    final_norm="transformer.norm_f",
    pass_through=(),
)


def today(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """StoryWriter's `clip_qkv` is 6, and transformers takes numbers with a point only."""
    attention = config.get("attn_config")
    if not isinstance(attention, Mapping) or type(clip := attention.get("clip_qkv")) is not int:
        return config
    return {**config, "attn_config": {**attention, "clip_qkv": float(clip)}}


def read(fields: Fields) -> Architecture:
    """Attention's fields are in `attn_config`; `learned_pos_emb` says nothing where there is ALiBi."""
    fields.expect("no_bias", True, why="transformers computes no biases")
    fields.expect("logit_scale", why="logits are not scaled here")
    for name in ("resid_pdrop", "emb_pdrop"):
        fields.expect(name, 0, 0.0, why="train without dropout, or set it to 0.0")
    # Of the program that trained the models.
    fields.ignore("attn_config", "embedding_fraction", "init_config", "init_device", "learned_pos_emb", "norm_type")
    fields.ignore("tokenizer_name", "verbose")
    attention = _attention(Fields(fields.get("attn_config", dict)))
    hidden, heads = fields.get("d_model", int), fields.get("n_heads", int)
    return nested(
        family="mpt",
        num_layers=fields.get("n_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=fields.get("expansion_ratio", int, 4) * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=fields.get("vocab_size", int),
        max_position_embeddings=fields.get("max_seq_len", int),
        norm="layernorm",
        norm_epsilon=fields.get("layer_norm_epsilon", float, 1e-5),
        activation="gelu",
        positions="alibi",
        **attention,
        tied_embeddings=fields.get("tie_word_embeddings", bool, True),
        initializer_range=fields.get("initializer_range", float, 0.02),
    )


def _attention(fields: Fields) -> dict[str, Any]:
    fields.expect("attn_type", "multihead_attention", why="every head has its own keys")
    fields.expect("attn_pdrop", 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.expect("softmax_scale", why="scores are scaled by 1 / sqrt(head_dim)")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        fields.expect(name, False, why="only plain causal attention is computed here")
    fields.expect("alibi", True, why="models with learned positions are not computed here")
    fields.ignore("attn_impl")
    clip = fields.optional("clip_qkv", float)
    read = {"qkv_clip": clip or None, "alibi_bias_max": fields.get("alibi_bias_max", int, 8)}  # 0 clips nothing
    fields.finish("mpt (attn_config)")
    return read


def write(a: Architecture) -> dict[str, Any]:
    return {
        "n_layers": a.num_layers,
        "d_model": a.hidden_size,
        "expansion_ratio": a.ffn_hidden_size // a.hidden_size,
        "n_heads": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "max_seq_len": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_pdrop": 0,
            "alibi": True,
            "alibi_bias_max": a.alibi_bias_max,
            "clip_qkv": a.qkv_clip,
        },
        "no_bias": True,
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
    }


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_MPT_7B = nested(
    family="mpt",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=50_432,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_epsilon=1e-5,
    activation="gelu",
    positions="alibi",
    tied_embeddings=True,
)
_TINY = replace(
    tiny(_MPT_7B),
    hidden_size=96,
    ffn_hidden_size=384,
    num_attention_heads=6,  # no power of two
    num_query_groups=6,
)

FAMILY = Family(
    name="mpt",
    title="MPT",
    hf_class="MptForCausalLM",
    other_classes=("MPTForCausalLM",),  # as the first models were published
    today=today,
    read=read,
    table=table,
    write=write,
    sizes={
        "mpt-tiny": _TINY,
        # Queries, keys and values of the tests are of size 2.
        "mpt-tiny-clipped": replace(_TINY, qkv_clip=2.0, alibi_bias_max=16),
        "mpt-7b": _MPT_7B,
        "mpt-7b-storywriter": replace(_MPT_7B, max_position_embeddings=65_536, qkv_clip=6.0, alibi_bias_max=16),
    },
)
