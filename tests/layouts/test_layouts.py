"""Models in layouts with context parallelism, against one process: some cells of the table in `cases.py`."""

import json
from pathlib import Path

import pytest

from tests.layouts.cases import LAYOUTS, MODELS, refusal
from tests.workers import results_of

TOLERANCE = 1e-5  # fp32: sums in another order, of four layers

# Models in layouts that are not tested elsewhere.
CELLS = {
    "CP 2": ["windows", "learned positions", "MTP"],
    "CP 2 heads": ["packed", "ALiBi", "sinks"],
    "TP 2 SP x CP 2": ["MLA", "MoE, correction bias, shared expert"],
    "CP 2 x EP 2": ["MoE, aux loss"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    (directory / "cells.json").write_text(json.dumps(CELLS))
    return results_of(Path(__file__).with_name("worker.py"), directory)


@pytest.mark.parametrize(("layout", "model"), [(layout, model) for layout, models in CELLS.items() for model in models])
def test_a_layout_trains_and_resumes_as_one_process(results, layout, model):
    figures = results[layout][model]
    assert figures["update"] < TOLERANCE
    assert figures["gradients"] < TOLERANCE
    assert figures["resumes equal"]
    assert figures["resumed by one process"] < TOLERANCE


def test_the_table_has_every_model_and_layout():
    """Each model is legal in some layout with context parallelism, or named as refused; each axis meets each other."""
    assert len(LAYOUTS) == len(set(LAYOUTS.values()))
    for model in MODELS:
        assert refusal(model, "DP 2") is None
        refused = refusal(model, "CP 2")
        assert (refused is not None) == (model == "gated delta net"), refused
