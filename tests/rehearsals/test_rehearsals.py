"""The recorded rehearsals of big models: the page has them, and their states are what arithmetic says."""

import json

import pytest

from shared.training.states import of_stages
from tests.rehearsals.cases import ROWS, architecture_of, config_of, largest_of_each_family
from tests.rehearsals.tables import PAGE, README, RECORDED, block, short_block

GiB = 2**30
RECORD = json.loads(RECORDED.read_text())


def test_the_pages_have_what_was_recorded() -> None:
    assert block(RECORD) in PAGE.read_text(), "make rehearsals"
    assert short_block(RECORD) in README.read_text(), "make rehearsals"


def test_all_cases_are_recorded() -> None:
    assert list(RECORD["rows"]) == [row.name for row in ROWS], "make rehearsals"
    assert list(RECORD["families"]) == list(largest_of_each_family()), "make rehearsals"
    for name, each in RECORD["families"].items():
        assert each["model"] == largest_of_each_family()[name]


def test_a_rank_holds_what_arithmetic_says() -> None:
    """Weights to the byte; gradients and the optimizer's share but for what pads buckets, and 4 bytes a tensor that count
    steps. What is allocated between updates is little more: workspaces, tables of angles, blocks."""
    rows = {row.name: row for row in ROWS}
    for name, stages in RECORD["rows"].items():
        expected = of_stages(config_of(rows[name]), architecture_of(rows[name].model))
        for each in stages:
            weights, gradients, optimizer = each["held"]
            said = expected[each["stage"]]
            assert weights == said.weights, name
            assert gradients == pytest.approx(said.gradients, rel=1e-4), name
            assert optimizer == pytest.approx(said.optimizer, rel=2e-2), name
            assert sum(each["held"]) < each["states"] < sum(each["held"]) + 1.5 * GiB, name
            assert each["states"] < each["peak"] <= each["reserved"], name


def test_families_that_were_rehearsed_fit() -> None:
    for name, each in RECORD["families"].items():
        assert each["fits"], name
        assert each["reserved"] < 76 * GiB
