"""Command-R, Command-R+ and Aya: parallel residual with one LayerNorm without bias, scaled logits."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import Spelling, attention_of, read_decoder, write_decoder
from shared.families.common.fields import Fields
from shared.families.family import TINY, Family

SPELLING = Spelling(epsilon="layer_norm_eps")


def read(fields: Fields) -> Architecture:
    fields.ignore("model_max_length")  # tokenizer setting
    bias = fields.get("attention_bias", bool, False)
    decoder = read_decoder(fields, SPELLING, default_theta=500_000.0, interleaved=True, default_epsilon=1e-5, tied=True)
    return decoder.build(
        "cohere",
        norm={"kind": "layernorm"},
        residual={"kind": "parallel_shared"},
        attention={
            "qk_norm": "each_head" if fields.get("use_qk_norm", bool, False) else None,
            "bias": bias,
            "output_bias": bias,
        },
        head={"multiplier": fields.get("logit_scale", float, 0.0625)},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {
        **write_decoder(a, SPELLING, head_dim=False),  # always hidden_size / num_attention_heads
        "logit_scale": a.head.multiplier,
        "attention_bias": attention_of(a).bias,
        "use_qk_norm": attention_of(a).qk_norm is not None,
    }


_COMMAND_R = {
    "num_hidden_layers": 40,
    "hidden_size": 8192,
    "intermediate_size": 22_528,
    "num_attention_heads": 64,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "rope_theta": 8_000_000.0,
}
_COHERE_TINY = {**_COMMAND_R, **TINY, "logit_scale": 0.25}

FAMILY = Family(
    name="cohere",
    title="Command-R, Command-R+, Aya",
    hf_class="CohereForCausalLM",
    read=read,
    write=write,
    size_configs={
        "cohere-tiny": _COHERE_TINY,
        "cohere-tiny-qk-norm": {**_COHERE_TINY, "rope_theta": 75_000_000.0, "use_qk_norm": True},
        "command-r": _COMMAND_R,
        "command-r-plus": {
            **_COMMAND_R,
            "num_hidden_layers": 64,
            "hidden_size": 12_288,
            "intermediate_size": 33_792,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "rope_theta": 75_000_000.0,
            "logit_scale": 0.8333333333333334,
            "use_qk_norm": True,
        },
    },
)
