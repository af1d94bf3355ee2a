"""MPT: ALiBi, no biases in linear layers and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.architecture.architecture import Alibi, Architecture
from shared.families.common.decoder import Spelling, attention_of, mlp_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import Family

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


def without_legacy_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """StoryWriter's `clip_qkv` is the integer 6; transformers accepts floats only."""
    attention = config.get("attn_config")
    if not isinstance(attention, Mapping) or type(clip := attention.get("clip_qkv")) is not int:
        return config
    return {**config, "attn_config": {**attention, "clip_qkv": float(clip)}}


_SPELLING = Spelling(
    layers="n_layers",
    hidden="d_model",
    ffn=None,
    heads="n_heads",
    groups=None,
    head_dim=None,
    positions="max_seq_len",
    epsilon="layer_norm_epsilon",
    activation=None,
    attention_dropout=None,
)


def read(fields: Fields) -> Architecture:
    """Attention fields are in `attn_config`; `learned_pos_emb` has no effect with ALiBi."""
    fields.expect("no_bias", True, why="transformers builds no biases")
    fields.expect("logit_scale", why="transformers ignores it")
    # Fields of the training framework.
    fields.ignore("attn_config", "embedding_fraction", "init_config", "init_device", "learned_pos_emb", "norm_type")
    fields.ignore("tokenizer_name", "verbose")
    attention = _attention(Fields(fields.get("attn_config", dict)))
    decoder = read_decoder(fields, _SPELLING, rotary=False, default_epsilon=1e-5, tied=True)
    ffn = fields.get("expansion_ratio", int, 4) * decoder.hidden_size
    return decoder.build(
        "mpt", norm={"kind": "layernorm"}, mlp={"ffn_hidden_size": ffn, "activation": "gelu"}, attention=attention
    )


def _attention(fields: Fields) -> dict[str, Any]:
    fields.expect("attn_type", "multihead_attention", why="this family has MHA")
    fields.expect("attn_pdrop", 0, 0.0, why="train without dropout, or set it to 0.0")
    fields.expect("softmax_scale", why="the softmax scale must be 1 / sqrt(head_dim)")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        fields.expect(name, False, why="only plain causal attention is supported for this family")
    fields.expect("alibi", True, why="learned positions are not supported for this family")
    fields.ignore("attn_impl")
    clip = fields.optional("clip_qkv", float)
    read = {"clip": clip or None, "alibi": Alibi(bias_max=fields.get("alibi_bias_max", int, 8))}  # 0: no clip
    fields.finish("mpt (attn_config)")
    return read


def write(a: Architecture) -> dict[str, Any]:
    alibi = attention_of(a).alibi
    assert alibi is not None
    return {
        **write_decoder(a, _SPELLING, rotary=False),
        "expansion_ratio": mlp_of(a).ffn_hidden_size // a.hidden_size,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_pdrop": 0,
            "alibi": True,
            "alibi_bias_max": alibi.bias_max,
            "clip_qkv": attention_of(a).clip,
        },
        "no_bias": True,
    }


_MPT_7B = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "vocab_size": 50_432, "max_seq_len": 2048, "attn_config": {}}
_MPT_TINY = {
    **_MPT_7B,
    "n_layers": 2,
    "d_model": 96,
    "n_heads": 6,  # not a power of two
    "vocab_size": 512,
    "max_seq_len": 512,
}

FAMILY = Family(
    name="mpt",
    title="MPT",
    hf_class="MptForCausalLM",
    other_classes=("MPTForCausalLM",),  # first uploads
    without_legacy_names=without_legacy_names,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "mpt-tiny": _MPT_TINY,
        # q, k and v are about 2 in the tests.
        "mpt-tiny-clipped": {**_MPT_TINY, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 2.0}},
        "mpt-7b": _MPT_7B,
        "mpt-7b-storywriter": {
            **_MPT_7B,
            "max_seq_len": 65_536,
            "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6.0},
        },
    },
)
