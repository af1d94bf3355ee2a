"""GPT-NeoX and Pythia: parallel residual with two norms, RoPE on a quarter of each head."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, Rotary
from shared.families.common.decoder import GELU, Spelling, attention_of, read_decoder, rotary_dim, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import Family

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
    class_head="lm_head",
    pass_through=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)

_SPELLING = Spelling(groups=None, head_dim=None, epsilon="layer_norm_eps", hidden_dropout="hidden_dropout")


def read(fields: Fields) -> Architecture:
    """`rotary_pct`, `rotary_emb_base`: RoPE fields in transformers 4."""
    fields.ignore("classifier_dropout", "rotary_pct", "rotary_emb_base", "partial_rotary_factor")
    decoder = read_decoder(
        fields, _SPELLING, rotary=False, default_epsilon=1e-5, activations=GELU, default_activation="gelu", dropout=0.0
    )
    base = fields.get("rotary_emb_base", float, 10_000.0)
    theta, scaling = fields.rope(base, decoder.max_position_embeddings, partial=True)
    dim = rotary_dim(fields, decoder.head_dim, 0.25, "rotary_pct")
    bias = fields.get("attention_bias", bool, True)
    return decoder.build(
        "gpt_neox",
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": "parallel" if fields.get("use_parallel_residual", bool, True) else "sequential"},
        embedding={"dropout": decoder.residual["dropout"]},
        attention={"rotary": Rotary(theta=theta, scaling=scaling, dim=dim), "bias": bias, "output_bias": bias},
        mlp={"bias": True},
    )


def write(a: Architecture) -> dict[str, Any]:
    fields = write_decoder(a, _SPELLING, partial=True)
    fraction, theta = fields.pop("partial_rotary_factor"), fields.pop("rope_theta")
    return {
        **fields,
        "rotary_pct": fraction,
        "rotary_emb_base": theta,
        "use_parallel_residual": a.layers[0].residual.kind == "parallel",
        "attention_bias": attention_of(a).bias,
    }


_PYTHIA_1_4B = {
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "vocab_size": 50_304,
    "max_position_embeddings": 2048,
}
_GPT_NEOX_TINY = {
    **_PYTHIA_1_4B,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}

FAMILY = Family(
    name="gpt_neox",
    title="GPT-NeoX-20B, Pythia",
    hf_class="GPTNeoXForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "gpt-neox-tiny": _GPT_NEOX_TINY,
        "gpt-neox-tiny-sequential": {**_GPT_NEOX_TINY, "use_parallel_residual": False},
        "pythia-1.4b": _PYTHIA_1_4B,
        "gpt-neox-20b": {
            **_PYTHIA_1_4B,
            "num_hidden_layers": 44,
            "hidden_size": 6144,
            "intermediate_size": 24_576,
            "num_attention_heads": 64,
            "vocab_size": 50_432,
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
)
