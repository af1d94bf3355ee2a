"""StarCoder and SantaCoder: GPT-2 with MQA and fused QKV `[q ; k ; v]`."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture, LearnedPositions
from shared.families.common.fields import Fields
from shared.families.common.gpt_fields import read_gpt, write_gpt
from shared.families.common.tensor_table import Names
from shared.families.family import Family

_NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    fused="groups",
    proj="attn.c_proj",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    pass_through=(),
)


def read(fields: Fields) -> Architecture:
    """Without `multi_query`: MHA with QKV rows `[q1 k1 v1 | q2 k2 v2 | ...]`, Megatron-Core's order."""
    fields.expect("add_cross_attention", False, why="cross attention is not supported")
    # Rounding of scores below fp32; settings of a server.
    fields.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    fields.ignore("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length")
    fields.ignore("pre_allocate_kv_cache", "validate_runner_input")
    decoder = read_gpt(fields, dropout=0.1, default_activation="gelu_pytorch_tanh", tied=True)
    groups = 1 if fields.get("multi_query", bool, True) else decoder.heads
    fields.expect("num_key_value_heads", groups, why="it must match multi_query: 1 if true, else as many as heads")
    return decoder.build(
        "gpt_bigcode",
        embedding={"positions": LearnedPositions()},
        attention={"groups": groups, "bias": True, "output_bias": True},
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**write_gpt(a), "multi_query": a.attention.groups == 1}


_STARCODER_15B = {
    "n_layer": 40,
    "n_embd": 6144,
    "n_head": 48,
    "vocab_size": 49_152,
    "n_positions": 8192,
    "activation_function": "gelu",
}
_GPT_BIGCODE_TINY = {
    **_STARCODER_15B,
    "n_layer": 2,
    "n_embd": 64,
    "n_inner": 160,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 512,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}

FAMILY = Family(
    name="gpt_bigcode",
    title="StarCoder, SantaCoder",
    hf_class="GPTBigCodeForCausalLM",
    read=read,
    names=_NAMES,
    write=write,
    size_configs={
        "gpt-bigcode-tiny": _GPT_BIGCODE_TINY,
        "gpt-bigcode-tiny-mha": {**_GPT_BIGCODE_TINY, "multi_query": False},
        "starcoder-15b": _STARCODER_15B,
    },
)
