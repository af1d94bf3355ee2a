"""Models in layouts with context parallelism or uneven stages, against one process: some cells of the table in `cases.py`."""

import json
from pathlib import Path

import pytest

from tests.layouts import record
from tests.layouts.cases import LAYOUTS, MODELS, refusal
from tests.workers import results_of

# Models in layouts that are not tested elsewhere.
CELLS = {
    "CP 2": ["windows", "learned positions", "MTP"],
    "CP 2 heads": ["packed", "ALiBi", "sinks"],
    "TP 2 SP x CP 2": ["MLA", "MoE, correction bias, shared expert"],
    "CP 2 x EP 2": ["MoE, aux loss"],
    "PP 2 VPP 2, layers 1,2,1,1": ["windows, five layers"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    (directory / "cells.json").write_text(json.dumps(CELLS))
    return results_of(Path(__file__).with_name("worker.py"), directory)


@pytest.mark.parametrize(("layout", "model"), [(layout, model) for layout, models in CELLS.items() for model in models])
def test_a_layout_trains_and_resumes_as_one_process(results, layout, model):
    figures = results[layout][model]
    assert figures["resumes equal"]
    assert record.worst(figures) < record.TOLERANCE, figures


def test_the_table_has_every_model_and_layout():
    """Each model is legal in some layout with context parallelism, or named as refused; each axis meets each other."""
    assert len(LAYOUTS) == len(set(LAYOUTS.values()))
    for model in MODELS:
        assert refusal(model, "DP 2") is None
        refused = refusal(model, "CP 2")
        assert (refused is not None) == (model == "gated delta net"), refused


def test_the_recorded_page_is_of_the_record_and_nothing_failed():
    written = json.loads(record.RECORD.read_text(encoding="utf-8"))
    assert record.shortcomings(written) == []
    for layout, cells in written["cells"].items():
        assert set(cells) <= set(record.legal(layout)), layout
    assert record.PAGE.read_text(encoding="utf-8") == record.page(written)


def test_a_failure_is_shown_as_one():
    good = {"update": 1e-7, "gradients": 2e-7, "resumes equal": True, "resumed by one process": 3e-7}
    found = {"GQA": good, "packed": good | {"gradients": 2e-5}, "windows": good | {"resumes equal": False}, "ALiBi": {}}
    cells = {model: {"run": "1", "code": "", "figures": figures} for model, figures in found.items()}
    runs = {"1": {"date": "today", "revision": "this", "machine": "here"}}
    written = {"runs": runs, "cells": {"CP 2": cells}}
    (line,) = (line for line in record.page(written).splitlines() if line.startswith("| CP 2 | 2 |"))
    shown = dict(zip(MODELS, (cell.strip() for cell in line.split("|")[3:]), strict=False))
    assert [shown[model] for model in found] == ["3e-07", "**failed** 2e-05", "**failed** 3e-07", "**failed**"]
    assert shown["sinks"] == "not run"
    assert [words.split(":")[1] for words in record.shortcomings(written)] == [" packed", " windows", " ALiBi"]


def test_a_cell_is_run_again_when_its_code_changed():
    cells = {model: {"run": "1", "code": record.code("CP 2", "GQA"), "figures": {}} for model in ("GQA", "packed")}
    written = {"runs": {}, "cells": {"CP 2": cells}}
    assert record.recorded(written, "CP 2", "GQA")
    cells["GQA"]["code"] = record.code("CP 2", "ALiBi")
    assert not record.recorded(written, "CP 2", "GQA")
    assert not record.recorded(written, "DP 2", "GQA")
    assert len({record.code(layout, "GQA") for layout in LAYOUTS}) == len(LAYOUTS)


def test_a_start_runs_what_has_changed_or_only_what_was_never_run():
    legal = {layout: record.legal(layout) for layout in LAYOUTS}
    assert record.to_run({"cells": {}}, missing=True) == {layout: models for layout, models in legal.items() if models}
    now, before = ({"code": code} for code in (record.code("CP 2", "GQA"), "of other code"))
    written = {"cells": {"CP 2": {"GQA": now, "packed": before}}}
    changed, never = (record.to_run(written, missing=missing)["CP 2"] for missing in (False, True))
    assert changed == [model for model in legal["CP 2"] if model != "GQA"]
    assert never == [model for model in legal["CP 2"] if model not in ("GQA", "packed")]
    every = {layout: dict.fromkeys(models, before) for layout, models in legal.items()}
    assert record.to_run({"cells": every}, missing=True) == {}


def test_the_same_refusal_of_two_sizes_is_one():
    reasons = [refusal("GQA", layout) for layout in ("EP 2", "EP 4")]
    assert reasons[0] != reasons[1]
    assert {record.short(reason) for reason in reasons} == {
        "--expert-parallel is for MoE, and the model has no experts"
    }
