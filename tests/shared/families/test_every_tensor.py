"""A missing tensor is an error for every family, in both directions: of a layer, an expert or the head."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.mapping.account import account_sources, account_targets

TINY = [name for name in registry.sizes() if "tiny" in name]


@dataclass(frozen=True)
class Found:
    shape: tuple[int, ...]
    place: str = "model.safetensors"


@pytest.mark.parametrize("size", TINY)
def test_each_absent_tensor_is_named(size: str) -> None:
    table = registry.table_of(registry.sizes()[size])
    entries = tuple(table.entries())
    sources = {source.name: Found(source.stored_shape) for entry in entries for source in entry.sources}
    kept = {name: Found(shape) for name, shape in table.required_pass_through().items()}
    sources |= kept
    targets = {entry.key: Found(entry.global_shape) for entry in entries}
    account_sources(table, sources, "dir")
    account_targets(table, targets, "dir")
    for name in sorted(kept)[-1:]:
        with pytest.raises(UserError, match=f"{name} is missing"):
            account_sources(table, {n: tensor for n, tensor in sources.items() if n != name}, "dir")
    last = {axis: count - 1 for axis, count in table.sizes.items()}
    for rule in table.rules:
        layer = {"layer": rule.layers[-1]} if rule.layers else {}
        for source in rule.sources:
            name = source.name.format(**last | layer)
            with pytest.raises(UserError, match="missing") as refused:
                account_sources(table, {n: tensor for n, tensor in sources.items() if n != name}, "dir")
            assert name in str(refused.value)
        key = rule.megatron.format(**last | layer)
        with pytest.raises(UserError, match="missing") as refused:
            account_targets(table, {k: tensor for k, tensor in targets.items() if k != key}, "dir")
        assert key in str(refused.value)
