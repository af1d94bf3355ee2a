"""The architecture in `inspect`: sizes, and every difference from the plain decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from shared.families import registry
from tests.tools.convert.conftest import SIZES
from tools.convert.architecture_summary import architecture_lines

LINES = {
    "llama-2-7b": [
        "32 layers, hidden_size 4096, vocab_size 32000, max_position_embeddings 4096",
        "all layers: attention heads 32, groups 32, head_dim 128",
        "all layers: MLP ffn_hidden_size 11008",
    ],
    "deepseek-v3": [
        "61 layers, hidden_size 7168, vocab_size 129280, max_position_embeddings 163840",
        "all layers: MLA heads 128, q_lora_rank 1536, kv_lora_rank 512, qk_nope_head_dim 128, qk_rope_head_dim 64, "
        "v_head_dim 128, rotary(scaling(kind yarn, factor 40, original_length 4096, mscale 1, mscale_all_dim 1))",
        "layers 0-2: MLP ffn_hidden_size 18432",
        "layers 3-60: MoE experts 256, top_k 8, expert(ffn_hidden_size 2048), shared(ffn_hidden_size 2048), score sigmoid, "
        "scaling 2.5, correction_bias, groups 8, top_groups 4, auxiliary_loss_over sequence",
        "all layers: norm(epsilon 1e-06)",
        "mtp: depth 1, each as layer 3",
    ],
    "gemma-3-4b-text": [
        "34 layers, hidden_size 2560, vocab_size 262208, max_position_embeddings 131072",
        "layers 0-4, 6-10, 12-16, 18-22, 24-28, 30-33: attention heads 8, groups 4, head_dim 256, window 1024, "
        "qk_norm head, scale 0.0625",
        "layers 5, 11, .. 29: attention heads 8, groups 4, head_dim 256, "
        "rotary(theta 1000000, scaling(kind linear, factor 8)), qk_norm head, scale 0.0625",
        "all layers: MLP ffn_hidden_size 10240, activation geglu_tanh",
        "all layers: norm(epsilon 1e-06, zero_centered_gamma), norm_placement sandwich",
        "embedding: multiplier 50.5964425627",
        "head: tied",
    ],
    "opt-350m": [
        "24 layers, hidden_size 1024, vocab_size 50272, max_position_embeddings 2048",
        "all layers: attention heads 16, groups 16, head_dim 64, no rotary, bias, output_bias",
        "all layers: MLP ffn_hidden_size 4096, activation relu, bias",
        "all layers: norm(kind layernorm, bias), norm_placement sum, residual(dropout 0.1)",
        "embedding: factorised_size 512, positions(offset 2)",
        "head: tied, no norm",
    ],
}


@pytest.mark.parametrize("size", LINES)
def test_lines(size: str) -> None:
    assert architecture_lines(registry.sizes()[size]) == LINES[size]


def variants(value: Any) -> Iterator[tuple[str, Any]]:
    """The value with one field changed, at any depth: the field's name, and the changed value."""
    for field in fields(value):
        own = getattr(value, field.name)
        if field.name == "family":  # printed elsewhere
            continue
        if field.name == "layers":
            others = [(name, (layer, *own[1:])) for name, layer in variants(own[0])]
        elif is_dataclass(own):
            others = list(variants(own))
        elif isinstance(own, bool):
            others = [("", not own)]
        elif isinstance(own, int | float):
            others = [("", own * 2 + 1)]
        elif isinstance(own, tuple):
            others = [("", own[1:])] if own else []
        elif isinstance(own, str) or "Literal" in str(field.type):
            others = [("", "another")]
        else:  # None, where a number or a value may be
            others = [("", 3)] if {"int", "float"} & set(str(field.type).split()) else []
        for name, other in others:
            try:
                yield f"{field.name}.{name}", replace(value, **{field.name: other})
            except ValueError:  # impossible
                continue


@pytest.mark.parametrize("size", SIZES)
def test_no_field_is_silent(size: str) -> None:
    """Whichever field changes, a line does."""
    lines = architecture_lines(SIZES[size])
    others = dict(variants(SIZES[size]))
    assert len(others) > 30
    for name, other in others.items():
        assert architecture_lines(other) != lines, name
