"""Adapters of every family's matrices: each number of PEFT's tensors once, the names that PEFT is given, refusals."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.mapping.adapters import (
    LoraSettings,
    adapted_linears,
    adapter_copies,
    peft_names,
    peft_shapes,
    peft_targets,
)

RANK = 3
SIZES = {size: architecture for size, architecture in registry.sizes().items() if "tiny" in size}


def cells(shape: tuple[int, int], block: tuple[slice, slice]) -> int:
    return len(range(shape[0])[block[0]]) * len(range(shape[1])[block[1]])


@pytest.mark.parametrize("size", SIZES)
def test_every_number_of_pefts_tensors_comes_from_one_here(size: str) -> None:
    table = registry.table_of(SIZES[size])
    linears = adapted_linears(table, ("all-linear",))
    names, shapes = peft_names(linears), peft_shapes(linears, RANK)
    counts: Counter[str] = Counter()
    rows: set[tuple[str, int, int]] = set()
    for linear in linears.values():
        for copy in adapter_copies(linear, names, RANK):
            counts[copy.peft] += cells(shapes[copy.peft], copy.block)
            first = (copy.block[1].start or 0) if copy.peft.endswith("lora_B.weight") else -1
            for row in range(shapes[copy.peft][0])[copy.block[0]]:
                assert (copy.peft, row, first) not in rows
                rows.add((copy.peft, row, first))
    assert counts == {name: prod(shape) for name, shape in shapes.items()}
    assert sum(linear.parameters(RANK) for linear in linears.values()) == sum(counts.values())


def test_a_layer_of_several_matrices() -> None:
    linears = adapted_linears(registry.table_of(SIZES["tiny"]), ("q_proj", "v_proj"))
    assert len(linears) == 2
    linear = linears["decoder.layers.1.self_attention.linear_qkv"]
    assert [matrix.name for matrix in linear.matrices] == [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    (piece,) = linear.pieces
    # Two groups of [two query heads, a key head, a value head] of 16 rows: the key's have no adapter.
    assert [(segment.source, segment.rows) for segment in piece.segments] == 2 * [(0, 32), (-1, 16), (1, 16)]
    assert linear.tensors(RANK) == {
        "decoder.layers.self_attention.linear_qkv.lora_A": (2, 2 * RANK, 64),
        "decoder.layers.self_attention.linear_qkv.lora_B": (2, 96, RANK),
    }


def test_experts_are_parameters_of_one_module() -> None:
    linears = adapted_linears(registry.table_of(SIZES["qwen3-moe-tiny"]), ("gate_up_proj", "mlp.experts.down_proj"))
    shapes, module = peft_shapes(linears, RANK), "base_model.model.model.layers.0.mlp.experts"
    experts = SIZES["qwen3-moe-tiny"].moe.experts
    assert shapes[f"{module}.base_layer.lora_A.weight"] == (experts * RANK, 64)
    assert shapes[f"{module}.lora_B.weight"] == (64, RANK * experts)
    only = adapted_linears(registry.table_of(SIZES["qwen3-moe-tiny"]), ("gate_up_proj",))
    assert f"{module}.lora_A.weight" in peft_shapes(only, RANK)


def test_names_that_peft_is_given() -> None:
    def targets(size: str, *names: str) -> dict:
        table = registry.table_of(SIZES[size])
        return peft_targets(adapted_linears(table, names or ("all-linear",)), table)

    assert targets("gpt-neox-tiny") == {
        "target_modules": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    }
    assert targets("deepseek-v2-tiny", "kv_b_proj", "shared_experts.up_proj", "experts.down_proj") == {
        "target_modules": ["kv_b_proj"],
        "target_parameters": ["mlp.experts.down_proj", "shared_experts.up_proj.weight"],
    }
    tower = targets("gemma3-images-tiny", "q_proj")["target_modules"]
    assert tower == r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"


def test_scale() -> None:
    assert LoraSettings(rank=16, alpha=32).scale == 2
    assert LoraSettings(rank=16, alpha=32, rslora=True).scale == 8


def test_refusals() -> None:
    table = registry.table_of(SIZES["qwen3-moe-tiny"])
    with pytest.raises(UserError, match=r"has no linear layer query_key_value; it has down_proj, gate_up_proj, k_proj"):
        adapted_linears(table, ("q_proj", "query_key_value"))
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj names a layer"):
        adapted_linears(table, ("layers.0.self_attn.q_proj",))
    with pytest.raises(UserError, match="needs --expert-tensor-parallel 1"):
        adapted_linears(table, ("all-linear",), expert_tensor=2)
    assert adapted_linears(table, ("q_proj",), expert_tensor=2)
