"""Gated delta net of Qwen3-Next: config.json fields and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Architecture, GatedDeltaNet
from shared.families.common.fields import Fields
from shared.mapping.layout import CONCAT, RowLayout, SplitInterleaved
from shared.mapping.rule import Rule, Source

# Parts of Megatron-Core's `in_proj`, a checkpoint key each.
IN_PROJ_PARTS = ("query", "key", "value", "z", "beta", "alpha")


def gated_delta_net_rules(
    net: GatedDeltaNet, hidden: int, layers: Sequence[int], key: str, name: str, *, zero_centered_gamma: bool
) -> Iterator[Rule]:
    """Rules from tensors under `name` to tensors under `key`, both with `{layer}`.

    Hugging Face: `in_proj_qkvz` is `[q1 k1 v1 z1 | q2 k2 v2 z2 | ...]`, `in_proj_ba` `[b1 a1 | b2 a2 | ...]`, one group per
    key head with its value heads. conv1d is `[q ; k ; v]` on both sides.
    """

    def rule(megatron: str, source: str, *shape: int, layout: RowLayout = CONCAT, **of_source: Any) -> Rule:
        sources = (Source(name=name + source, shape=shape, **of_source),)
        return Rule(megatron=f"{key}.{megatron}", axes=("layer",), layers=tuple(layers), sources=sources, layout=layout)

    k, v, heads = net.key_size, net.value_size, net.value_heads
    for source, rows in (("in_proj_qkvz", (k, k, v, v)), ("in_proj_ba", (heads, heads))):
        parts = IN_PROJ_PARTS[:4] if len(rows) == 4 else IN_PROJ_PARTS[4:]
        for place, part in enumerate(parts):
            layout = SplitInterleaved(parts=rows, groups=net.key_heads, part=place)
            yield rule(f"in_proj.weight.{part}", f"{source}.weight", sum(rows), hidden, layout=layout)
    for place, part in enumerate(IN_PROJ_PARTS[:3]):
        layout = SplitInterleaved(parts=(k, k, v), groups=1, part=place)
        yield rule(f"conv1d.weight.{part}", "conv1d.weight", 2 * k + v, 1, net.conv_kernel, layout=layout)
    yield rule("A_log", "A_log", heads, init="log")
    yield rule("dt_bias", "dt_bias", heads, init="one")
    # Hugging Face: not zero-centred. Megatron-Core: layernorm_zero_centered_gamma covers this norm, too.
    norm = rule("out_norm.weight", "norm.weight", net.value_head_dim)
    yield replace(norm, zero_centered_gamma=zero_centered_gamma)
    yield rule("out_proj.weight", "out_proj.weight", hidden, v)


def read_gated_delta_net(fields: Fields) -> GatedDeltaNet:
    """The gated delta net of config.json."""
    return GatedDeltaNet(
        key_heads=fields.get("linear_num_key_heads", int, 16),
        value_heads=fields.get("linear_num_value_heads", int, 32),
        key_head_dim=fields.get("linear_key_head_dim", int, 128),
        value_head_dim=fields.get("linear_value_head_dim", int, 128),
        conv_kernel=fields.get("linear_conv_kernel_dim", int, 4),
    )


def write_gated_delta_net(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_gated_delta_net`."""
    net = a.delta_net
    assert net is not None
    return {
        "linear_num_key_heads": net.key_heads,
        "linear_num_value_heads": net.value_heads,
        "linear_key_head_dim": net.key_head_dim,
        "linear_value_head_dim": net.value_head_dim,
        "linear_conv_kernel_dim": net.conv_kernel,
    }
