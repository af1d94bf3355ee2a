"""InternLM2 and 2.5: LLaMA with other tensor names and fused QKV in Megatron-Core's order."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names
from shared.families.family import TINY, Family

_NAMES = Names(
    embedding="model.tok_embeddings",
    attention_norm="attention_norm",
    mlp_norm="ffn_norm",
    qkv=("attention.wqkv",),
    fused="groups",
    proj="attention.wo",
    fc1=("feed_forward.w1", "feed_forward.w3"),
    fc2="feed_forward.w2",
    head="output",
    pass_through=("attention.rotary_emb.inv_freq",),
)


def read(fields: Fields) -> Architecture:
    """`bias`: of wqkv and wo."""
    bias = fields.get("bias", bool, True)
    return read_decoder(fields).build("internlm2", attention={"bias": bias, "output_bias": bias})


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "bias": attention_of(a).bias}


_INTERNLM2_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 92_544,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1_000_000.0,
    "bias": False,
}
_INTERNLM2_TINY = {**_INTERNLM2_7B, **TINY}
_INTERNLM2_5_7B = {**_INTERNLM2_7B, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}

FAMILY = Family(
    name="internlm2",
    title="InternLM2, 2.5",
    hf_class="InternLM2ForCausalLM",
    remote=True,
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "internlm2-tiny": _INTERNLM2_TINY,
        "internlm2-tiny-bias": {**_INTERNLM2_TINY, "bias": True},
        "internlm2-1.8b": {
            **_INTERNLM2_5_7B,
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
        },
        "internlm2-7b": _INTERNLM2_7B,
        "internlm2.5-7b": _INTERNLM2_5_7B,
        "internlm2-20b": {
            **_INTERNLM2_7B,
            "num_hidden_layers": 48,
            "hidden_size": 6144,
            "intermediate_size": 16_384,
            "num_attention_heads": 48,
        },
    },
)
