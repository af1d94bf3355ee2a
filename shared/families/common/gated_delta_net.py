"""Tensors and fields of gated delta nets, as Qwen3-Next has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Delta as DeltaNet
from shared.families.common.fields import Fields
from shared.mapping.layout import CONCAT, RowLayout, SplitInterleaved
from shared.mapping.rule import Rule, Source

DELTA_PARTS = (
    "query",
    "key",
    "value",
    "z",
    "beta",
    "alpha",
)  # Megatron-Core's names; a checkpoint holds each by itself


def delta_rules(a: Architecture, delta: DeltaNet, key: str, name: str) -> Iterator[Rule]:
    """Tensors under `key` of those under `name`, both with `{layer}` in them.

    Hugging Face's `in_proj_qkvz` is `[q1 k1 v1 z1 | q2 k2 v2 z2 | ...]` by heads of keys, with the heads of values that
    belong to one, and `in_proj_ba` likewise `[b1 a1 | b2 a2 | ...]`. Its convolution has `[q ; k ; v]`, as
    Megatron-Core's.
    """

    def rule(megatron: str, source: str, *shape: int, layout: RowLayout = CONCAT, **of_source: Any) -> Rule:
        sources = (Source(name=name + source, shape=shape, **of_source),)
        return Rule(megatron=f"{key}.{megatron}", axes=("layer",), layers=delta.layers, sources=sources, layout=layout)

    hidden, k, v, heads = a.hidden_size, delta.key_size, delta.value_size, delta.value_heads
    for source, rows in (("in_proj_qkvz", (k, k, v, v)), ("in_proj_ba", (heads, heads))):
        parts = DELTA_PARTS[:4] if len(rows) == 4 else DELTA_PARTS[4:]
        for place, part in enumerate(parts):
            layout = SplitInterleaved(parts=rows, groups=delta.key_heads, part=place)
            yield rule(f"in_proj.weight.{part}", f"{source}.weight", sum(rows), hidden, layout=layout)
    for place, part in enumerate(DELTA_PARTS[:3]):
        layout = SplitInterleaved(parts=(k, k, v), groups=1, part=place)
        yield rule(f"conv1d.weight.{part}", "conv1d.weight", 2 * k + v, 1, delta.conv_kernel, layout=layout)
    yield rule("A_log", "A_log", heads, init="log")
    yield rule("dt_bias", "dt_bias", heads, init="one")
    # Hugging Face stores this norm's weight as it is; Megatron-Core has one switch for all norms.
    yield replace(
        rule("out_norm.weight", "norm.weight", delta.value_head_dim), zero_centered_gamma=a.norm == "rmsnorm_1p"
    )
    yield rule("out_proj.weight", "out_proj.weight", hidden, v)


def delta_fields(fields: Fields, layers: tuple[int, ...]) -> DeltaNet:
    """What a configuration says of them."""
    return DeltaNet(
        layers=layers,
        key_heads=fields.get("linear_num_key_heads", int, 16),
        value_heads=fields.get("linear_num_value_heads", int, 32),
        key_head_dim=fields.get("linear_key_head_dim", int, 128),
        value_head_dim=fields.get("linear_value_head_dim", int, 128),
        conv_kernel=fields.get("linear_conv_kernel_dim", int, 4),
    )


def written_delta_fields(delta: DeltaNet) -> dict[str, Any]:
    """The same backwards."""
    return {
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_head_dim,
        "linear_value_head_dim": delta.value_head_dim,
        "linear_conv_kernel_dim": delta.conv_kernel,
    }
