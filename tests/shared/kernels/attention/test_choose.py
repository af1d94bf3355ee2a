import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from shared.errors import UserError
from shared.kernels.attention import choose as module
from shared.kernels.attention.choose import BACK_ENDS, attend, choose
from shared.kernels.attention.needs import Carries, Feature, Needs
from tests.references.attention import call

PAGE = Path(__file__).parents[4] / "docs" / "attention.md"
HOPPER = Needs(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    query_length=4096,
    key_length=4096,
    heads=32,
    groups=8,
    head_dim=128,
    value_dim=128,
)
AMPERE = replace(HOPPER, capability=(8, 0))
BLACKWELL = replace(HOPPER, capability=(10, 0))
CPU = replace(HOPPER, device="cpu", capability=None)
MLA = {"groups": 32, "head_dim": 192}
ALL = ("flash_attn", "flash_attn_interface", "transformer_engine.pytorch")


@pytest.fixture
def installed(monkeypatch):
    """A function: these packages can be imported, the others cannot."""
    lacking = {"flash-attn-3": ALL[1], "flash-attn-2": ALL[0], "te": ALL[2]}

    def install(*packages):
        choose.cache_clear()
        for name, package in lacking.items():
            reason = None if package in packages else f"{package} is not installed"
            back_end = replace(BACK_ENDS[name], unavailable=lambda reason=reason: reason)
            monkeypatch.setitem(module.BACK_ENDS, name, back_end)

    yield install
    choose.cache_clear()


@pytest.mark.parametrize(
    ("needs", "packages", "expected"),
    [
        (CPU, ALL, "sdpa"),
        (replace(CPU, packed=True), ALL, "segments"),
        (replace(CPU, prefix=True), ALL, "sdpa"),
        (replace(CPU, prefix=True, softcap=True), ALL, "eager"),
        (replace(CPU, alibi=True, sinks=True, softcap=True, window=True), ALL, "segments"),
        (HOPPER, (), "sdpa"),
        (HOPPER, ALL, "flash-attn-3"),
        (AMPERE, ALL, "sdpa"),
        (BLACKWELL, ALL, "sdpa"),
        (replace(HOPPER, packed=True), ALL, "flash-attn-3"),
        (replace(AMPERE, packed=True), ALL, "flash-attn-2"),
        (replace(AMPERE, packed=True), (), "varlen"),
        (replace(AMPERE, packed=True, window=True, sinks=True), (), "varlen"),
        (replace(HOPPER, packed=True, window=True, sinks=True), ALL, "flash-attn-2"),
        (replace(AMPERE, packed=True, softcap=True), (), "segments"),
        (replace(AMPERE, packed=True, softcap=True), ALL, "flash-attn-2"),
        (replace(AMPERE, packed=True, alibi=True), ALL, "flash-attn-2"),
        (replace(AMPERE, packed=True, rounded_alibi=True, alibi=True), ALL, "segments"),
        (replace(AMPERE, packed=True, dropout=True), (ALL[2],), "te"),
        (replace(AMPERE, packed=True, **MLA), (), "varlen"),
        (replace(AMPERE, packed=True, head_dim=512), ALL, "segments"),
        (replace(AMPERE, packed=True, dtype=torch.float32), ALL, "segments"),
        (replace(AMPERE, packed=True, capability=(7, 5)), ALL, "segments"),
        (replace(HOPPER, query_length=1024), (), "varlen"),
        (replace(AMPERE, prefix=True), ALL, "sdpa"),
    ],
)
def test_the_first_that_carries_the_call(needs, packages, expected, installed):
    installed(*packages)
    assert choose(needs) == expected


def test_a_named_one_is_taken_where_it_carries_the_call(installed):
    installed()
    for name in ("eager", "segments", "sdpa"):
        assert choose(CPU, name) == name
    assert choose(replace(AMPERE, packed=True), "varlen") == "varlen"


def test_a_refusal_is_one_line_with_every_reason(installed):
    installed("flash_attn")
    needs = replace(HOPPER, packed=True, sinks=True, softcap=True)
    with pytest.raises(UserError) as refused:
        choose(needs, "varlen")
    assert str(refused.value) == (
        "--attention-backend varlen does not carry this model's attention here: soft cap: no such argument; "
        "flash-attn-2 and segments and eager do; not flash-attn-3 (sinks: its backward pass takes no log-sum-exp from "
        "outside in every release), sdpa (packed rows: would take a mask of [sequence, sequence], soft cap: no such "
        "argument, sinks: no such argument), te (soft cap: no such argument, sinks: a parameter of its own module)"
    )
    with pytest.raises(UserError, match="te does not carry .* here: transformer_engine.pytorch is not installed; "):
        choose(HOPPER, "te")
    with pytest.raises(UserError, match="te does not carry .* here: CUDA only; sdpa and segments and eager do; "):
        choose(CPU, "te")


def test_the_call_goes_to_the_chosen_back_end(monkeypatch):
    choose.cache_clear()
    called = []
    for name, back_end in BACK_ENDS.items():
        given = replace(back_end, attend=lambda given, name=name: called.append(name) or given.q_BHQD)
        monkeypatch.setitem(module.BACK_ENDS, name, given)
    q = torch.randn(1, 2, 4, 8)
    attend(call(q, q, q))
    attend(call(q, q, q, torch.tensor([[1, 1, 2, 2]])))
    attend(call(q, q, q), "eager")
    attend(call(q[:, :, 2:], q, q))
    assert called == ["sdpa", "segments", "eager", "segments"]
    with pytest.raises(UserError, match="--attention-backend varlen"):
        attend(call(q, q, q), "varlen")


def test_eager_carries_everything():
    assert BACK_ENDS["eager"].carries == Carries()


def test_the_page_shows_the_table():
    """docs/attention.md, a row for each feature."""
    names = list(BACK_ENDS)
    rows = {
        feature: [" " if feature in BACK_ENDS[name].carries.lacks else "x" for name in names]
        for feature in get_args(Feature)
    }
    written = PAGE.read_text(encoding="utf-8")
    assert f"| | {' | '.join(f'`{name}`' for name in names)} |" in written
    for feature, cells in rows.items():
        assert re.search(rf"^\| {re.escape(feature)} \| {re.escape(' | '.join(cells))} \|$", written, re.M), feature
