"""The recorded rehearsals of big models: the page has them, and their states are what arithmetic says."""

import json

from tests.rehearsals.cases import ROWS, largest_of_each_family
from tests.rehearsals.tables import PAGE, RECORDED, block

GiB = 2**30
RECORD = json.loads(RECORDED.read_text())


def test_the_page_has_what_was_recorded() -> None:
    assert block(RECORD) in PAGE.read_text(), "make rehearsals"


def test_what_is_recorded_are_cases() -> None:
    """The page names those that were not recorded yet."""
    assert len(RECORD["rows"]) >= 4
    assert set(RECORD["rows"]) <= {row.name for row in ROWS}, "make rehearsals"
    assert set(RECORD["families"]) <= set(largest_of_each_family())
    for name, each in RECORD["families"].items():
        assert each["model"] == largest_of_each_family()[name]


def test_a_rank_holds_what_arithmetic_says() -> None:
    """To the byte; what is allocated between updates is little more: workspaces, tables of angles, blocks."""
    for name, stages in RECORD["rows"].items():
        for each in stages:
            assert each["held"] == each["held_rehearsed"], name
            assert sum(each["held"]) < each["states"] < sum(each["held"]) + 1.5 * GiB, name
            assert each["states"] < each["peak"] <= each["reserved"], name


def test_families_that_were_rehearsed_fit() -> None:
    for name, each in RECORD["families"].items():
        assert each["fits"], name
        assert each["reserved"] < 76 * GiB
