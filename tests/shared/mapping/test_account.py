"""The account of tensors: none lost, none invented."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from shared.errors import UserError
from shared.mapping.account import account_sources, account_targets
from shared.mapping.layout import PadRows, SplitInterleaved
from shared.mapping.rule import PassThroughTensor, Rule, Source, Table, TiedTensor


@dataclass(frozen=True)
class Found:
    shape: tuple[int, ...]
    place: str = "model-00001.safetensors"


TABLE = Table(
    rules=(
        Rule(megatron="embedding", sources=(Source(name="wte", shape=(5, 3)),), layout=PadRows(rows=8)),
        Rule(megatron="layers.fc", axes=("layer",), sources=(Source(name="h.{layer}.fc", shape=(2, 3)),)),
    ),
    tied_tensors=(TiedTensor(name="head", tied_to="wte"),),
    pass_through=(PassThroughTensor(name="h.{layer}.inv_freq"),),
    sizes={"layer": 2},
)
SOURCES = {"wte": Found((5, 3)), "h.0.fc": Found((2, 3)), "h.1.fc": Found((2, 3))}
TARGETS = {"embedding": Found((8, 3)), "layers.fc": Found((2, 2, 3))}


def test_each_tensor_has_its_place() -> None:
    account = account_sources(TABLE, SOURCES | {"head": Found((5, 3)), "h.1.inv_freq": Found((7,))}, "dir")
    assert len(account.entries) == 3
    assert [tied.name for tied in account.tied_tensors] == ["head"]
    assert account.pass_through == ("h.1.inv_freq",)
    assert account_sources(TABLE, SOURCES, "dir").tied_tensors == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h.1.fc": None}, r"dir: h.1.fc is missing"),
        ({"h.1.fc": None, "wte": None, "h.0.inv_freq": Found((7,))}, r"wte and 1 more are missing"),
        ({"h.1.fc": None, "wte": None}, r"dir: 1 tensors in all, though config.json asks for 2 layers"),
        ({"h.2.fc": Found((2, 3), "b.safetensors")}, r"b.safetensors: h.2.fc is unknown .*nearest: h\.\d\.fc"),
        ({"h.2.inv_freq": Found((7,))}, r"h.2.inv_freq is unknown"),
        ({"h.0.fc": Found((3, 2))}, r"model-00001.safetensors: h.0.fc is \[3, 2\], config.json asks for \[2, 3\]"),
        ({"head": Found((4, 3))}, r"head is \[4, 3\]"),
    ],
)
def test_sources_that_do_not_add_up(changes: dict[str, Found | None], message: str) -> None:
    found = {name: tensor for name, tensor in (SOURCES | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        account_sources(TABLE, found, "dir")


def test_a_table_that_uses_a_source_twice_is_a_defect() -> None:
    twice = replace(TABLE, rules=(*TABLE.rules, replace(TABLE.rules[0], megatron="output")))
    with pytest.raises(AssertionError, match="once"):
        account_sources(twice, SOURCES, "dir")


def test_rules_may_share_a_source_and_must_use_it_up() -> None:
    source = (Source(name="qk", shape=(4, 3)),)
    halves = [
        Rule(megatron=f"h.{p}", sources=source, layout=SplitInterleaved(parts=(2, 2), groups=2, part=p)) for p in (0, 1)
    ]
    shared = replace(TABLE, rules=(*TABLE.rules, *halves))
    assert len(account_sources(shared, SOURCES | {"qk": Found((4, 3))}, "dir").entries) == 5
    with pytest.raises(AssertionError, match="row 1 of qk"):
        account_sources(replace(TABLE, rules=(*TABLE.rules, halves[0])), SOURCES | {"qk": Found((4, 3))}, "dir")


def test_slices_of_a_source_are_used_once_each() -> None:
    source = Source(name="all", shape=(2, 3), stacked_axes=("expert",))
    table = Table(rules=(Rule(megatron="fc", axes=("expert",), sources=(source,)),), sizes={"expert": 4})
    assert len(account_sources(table, {"all": Found((4, 2, 3))}, "dir").entries) == 4
    with pytest.raises(UserError, match=r"all is \[4, 3, 2\], config.json asks for \[4, 2, 3\]"):
        account_sources(table, {"all": Found((4, 3, 2))}, "dir")
    first = replace(table.rules[0], axes=(), sources=(replace(source, stacked_axes=(), stack=(4,), index=(0,)),))
    alone = replace(table, rules=(replace(table.rules[0], axes=("layer",)), first), sizes={"layer": 1, "expert": 4})
    with pytest.raises((AssertionError, KeyError)):
        account_sources(alone, {"all": Found((4, 2, 3))}, "dir")


@pytest.mark.parametrize("rows", [5, 8, 256])
def test_any_padding_of_the_vocabulary_is_the_same_tensor(rows: int) -> None:
    assert len(account_targets(TABLE, TARGETS | {"embedding": Found((rows, 3))}, "dir")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.fc": None}, "dir: layers.fc is missing"),
        ({"layers.other": Found((1,))}, "dir: layers.other is unknown"),
        ({"embedding": Found((4, 3))}, r"embedding is \[4, 3\], hf/config.json asks for \[8, 3\]"),
        ({"embedding": Found((8, 2))}, r"embedding is \[8, 2\]"),
        ({"layers.fc": Found((3, 2, 3))}, r"layers.fc is \[3, 2, 3\], hf/config.json asks for \[2, 2, 3\]"),
    ],
)
def test_targets_that_do_not_add_up(changes: dict[str, Found | None], message: str) -> None:
    found = {name: tensor for name, tensor in (TARGETS | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        account_targets(TABLE, found, "dir", ignored=("optimizer",))


def test_optimizer_state_is_knowingly_left_out() -> None:
    assert account_targets(TABLE, TARGETS | {"optimizer.exp_avg": Found((1,))}, "dir", ignored=("optimizer",))
