"""Rules applied to every layer."""

from __future__ import annotations

import pytest

from shared.errors import UserError
from shared.mapping.layout import CONCAT, Interleave, PadRows
from shared.mapping.rule import Axis, PassThroughTensor, Rule, Source, Table, TiedTensor

QKV = Rule(
    megatron="layers.qkv.weight",
    axes=("layer",),
    sources=(Source(name="h.{layer}.q", shape=(8, 3)), Source(name="h.{layer}.kv", shape=(4, 3))),
    layout=Interleave(groups=2),
)
EMBEDDING = Rule(megatron="embedding", sources=(Source(name="wte", shape=(5, 3)),), layout=PadRows(rows=8))


def test_entries_are_the_slices_of_stacked_tensors() -> None:
    entries = list(Table(rules=(EMBEDDING, QKV), sizes={"layer": 3}).entries())
    assert [(entry.key, entry.index) for entry in entries] == [
        ("embedding", ()),
        *(("layers.qkv.weight", (layer,)) for layer in range(3)),
    ]
    assert [source.name for source in entries[2].sources] == ["h.1.q", "h.1.kv"]
    assert entries[2].global_shape == (3, 12, 3)
    assert entries[0].global_shape == (8, 3)
    assert (entries[0].padded, entries[0].padding_rows) == (True, 3)
    assert (entries[1].padded, entries[1].padding_rows) == (False, 0)


def test_experts_are_stacked_behind_layers() -> None:
    rule = Rule(megatron="fc2", axes=("layer", "expert"), sources=(Source(name="h.{layer}.e.{expert}", shape=(2, 3)),))
    entries = list(Table(rules=(rule,), sizes={"layer": 2, "expert": 3}).entries())
    assert [entry.index for entry in entries] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert entries[5].global_shape == (2, 3, 2, 3)
    assert entries[5].sources[0].name == "h.1.e.2"


def test_layers_that_differ_have_keys_of_their_own() -> None:
    source = Source(name="h.{layer}.e.{expert}", shape=(2, 3))
    rule = Rule(megatron="layers.{layer}.fc2", axes=("layer", "expert"), layers=(0, 2), sources=(source,))
    entries = list(Table(rules=(rule,), sizes={"layer": 3, "expert": 2}).entries())
    keys = [("layers.0.fc2", (0,)), ("layers.0.fc2", (1,)), ("layers.2.fc2", (0,)), ("layers.2.fc2", (1,))]
    assert [(entry.key, entry.index) for entry in entries] == keys
    assert entries[3].sources[0].name == "h.2.e.1"
    assert entries[3].global_shape == (2, 2, 3)


def test_aside_names() -> None:
    table = Table(rules=(), pass_through=(PassThroughTensor(name="h.{layer}.inv_freq"),), sizes={"layer": 2})
    assert table.pass_through_names() == {"h.0.inv_freq", "h.1.inv_freq"}


def test_sources_that_cannot_be_joined_are_named() -> None:
    rule = Rule(
        megatron="fc1", sources=(Source(name="gate", shape=(2, 3)), Source(name="up", shape=(2, 4))), layout=CONCAT
    )
    (entry,) = Table(rules=(rule,), sizes={}).entries()
    with pytest.raises(UserError, match="gate, up do not make fc1"):
        _ = entry.shape


def test_a_prefix_that_no_name_has_is_left_out() -> None:
    rule = Rule(megatron="fc", axes=("layer",), sources=(Source(name="model.h.{layer}.fc", shape=(2, 3)),))
    table = Table(
        rules=(rule,),
        tied_tensors=(TiedTensor(name="head", tied_to="model.wte"),),
        pass_through=(PassThroughTensor(name="model.h.{layer}.mask"),),
        prefix_variants={"model.": ("",)},
        sizes={"layer": 1},
    )
    assert table.with_names_of({"model.h.0.fc", "head"}) is table
    bare = table.with_names_of({"h.0.fc", "head"})
    assert [source.name for entry in bare.entries() for source in entry.sources] == ["h.0.fc"]
    assert (bare.tied_tensors[0].name, bare.tied_tensors[0].tied_to) == ("head", "wte")
    assert bare.pass_through_names() == {"h.0.mask"}


def test_a_source_may_hold_all_experts() -> None:
    source = Source(name="h.{layer}.experts", shape=(3, 2), stacked_axes=("expert",))
    rule = Rule(megatron="fc2", axes=("layer", "expert"), sources=(source,))
    entries = list(Table(rules=(rule,), sizes={"layer": 2, "expert": 3}).entries())
    assert entries[5].global_shape == (2, 3, 3, 2)
    (last,) = entries[5].sources
    assert (last.name, last.stored_shape, last.index) == ("h.1.experts", (3, 3, 2), (2,))


def test_alternatives_are_taken_where_their_tensors_are_found() -> None:
    """Experts one by one, or as one tensor; each rule by itself, also under another prefix."""
    axes: tuple[Axis, ...] = ("layer", "expert")
    single = Source(name="model.h.{layer}.{expert}.fc", shape=(3, 2))
    together = Source(name="model.h.{layer}.fc", shape=(3, 2), stacked_axes=("expert",))
    table = Table(
        rules=(
            Rule(megatron="fc", axes=axes, sources=(single,)),
            Rule(megatron="end", sources=(Source(name="end", shape=(2,)),)),
        ),
        alternatives=(Rule(megatron="fc", axes=axes, sources=(together,)),),
        prefix_variants={"model.": ("",)},
        sizes={"layer": 2, "expert": 2},
    )
    assert table.with_names_of({"model.h.0.0.fc"}) is table
    assert table.names() >= {"model.h.1.fc", "model.h.1.1.fc"}
    for prefix in ("model.", ""):
        chosen = table.with_names_of({f"{prefix}h.1.fc"})
        assert [rule.megatron for rule in chosen.rules] == ["fc", "end"]
        assert [source.name for source in chosen.rules[0].sources] == [f"{prefix}h.{{layer}}.fc"]
