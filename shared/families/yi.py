"""Yi as it was first published: LLaMA with norms of another name. Later files of the same models are LLaMA's."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import nested
from shared.families.common.decoder import common_fields, written_fields
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.families.family import Family, tiny
from shared.mapping.rule import Table


def read(fields: Fields) -> Architecture:
    """`num_key_value_heads` has a default of its own in the published class, and is always given."""
    fields.get("num_key_value_heads", int)
    return nested(family="yi", **common_fields(fields, default_theta=5_000_000.0, default_epsilon=1e-5))


def write(a: Architecture) -> dict[str, Any]:
    return written_fields(a)


def table(a: Architecture) -> Table:
    return decoder_table(a, Names(attention_norm="ln1", mlp_norm="ln2"))


_YI_6B = nested(
    family="yi",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=4,
    head_dim=128,
    vocab_size=64_000,
    max_position_embeddings=4096,
    norm_epsilon=1e-5,
    rope_theta=5_000_000.0,
    tied_embeddings=False,
)

FAMILY = Family(
    name="yi",
    title="Yi as first published",
    hf_class="YiForCausalLM",
    remote=True,
    model_types=("Yi",),
    read=read,
    table=table,
    write=write,
    sizes={
        "yi-tiny": tiny(_YI_6B),
        "yi-6b": _YI_6B,
        "yi-34b": replace(
            _YI_6B,
            num_layers=60,
            hidden_size=7168,
            ffn_hidden_size=20_480,
            num_attention_heads=56,
            num_query_groups=8,
        ),
    },
)
