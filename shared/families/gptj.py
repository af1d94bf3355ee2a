"""GPT-J: attention and MLP side by side on one norm, neighbours rotated, a bias of the logits."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.version_1 import nested
from shared.families.common.fields import Fields
from shared.families.common.gpt_fields import gpt_fields, written_gpt_fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table

_NAMES = Names(
    embedding="transformer.wte",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    proj="attn.out_proj",
    fc1=("mlp.fc_in",),
    fc2="mlp.fc_out",
    final_norm="transformer.ln_f",
    pass_through=("attn.bias", "attn.masked_bias"),
)


def read(fields: Fields) -> Architecture:
    fields.expect("rotary", True, why="this family has rotary embedding")
    common = gpt_fields(fields, dropout=0.0, default_activation="gelu_new", tied=False)
    rotated = fields.get("rotary_dim", int, 64)
    return nested(
        family="gptj",
        residual="parallel_shared",
        rotary_dim=None if rotated == common["head_dim"] else rotated,
        rotary_interleaved=True,
        num_query_groups=common["num_attention_heads"],
        output_bias=True,
        **common,
    )


def write(a: Architecture) -> dict[str, Any]:
    return {**written_gpt_fields(a), "rotary_dim": a.rotated}


def table(a: Architecture) -> Table:
    return decoder_table(a, _NAMES)


_GPT_J_6B = nested(
    family="gptj",
    num_layers=28,
    hidden_size=4096,
    ffn_hidden_size=16_384,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=256,
    vocab_size=50_400,
    max_position_embeddings=2048,
    norm="layernorm",
    norm_bias=True,
    norm_epsilon=1e-5,
    residual="parallel_shared",
    activation="gelu_tanh",
    rotary_dim=64,
    rotary_interleaved=True,
    mlp_bias=True,
    output_bias=True,
    tied_embeddings=False,
)

FAMILY = Family(
    name="gptj",
    title="GPT-J",
    hf_class="GPTJForCausalLM",
    read=read,
    table=table,
    write=write,
    sizes={"gptj-tiny": tiny(_GPT_J_6B, num_query_groups=4, rotary_dim=8), "gpt-j-6b": _GPT_J_6B},
)
