"""A run resumes at another layout, and at the same layout bit for bit."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.workers import results_of

WORKER = Path(__file__).with_name("layouts_worker.py")
specification = importlib.util.spec_from_file_location("training_layouts_worker", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)

# Layouts add the same fp32 numbers in another order. Adam turns such a difference where a gradient is near zero into a
# whole step of that weight; over the four updates compared here the losses stay within a few 1e-7 of each other.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def runs(start, tiny_run, start_mtp, mtp_run, tmp_path_factory):
    """(directory, one process's results, two processes' results): one spawn serves all tests and both models."""
    directory = tmp_path_factory.mktemp("layouts")
    alone = {}
    for name, (config, architecture), first in (("plain", tiny_run, start), ("mtp", mtp_run, start_mtp)):
        given = {"config": asdict(config), "architecture": architecture.to_dict()}
        (directory / name).mkdir()
        (directory / name / "run.json").write_text(json.dumps(given))
        one = worker.Session(config, architecture, first, restore=False)
        one.train(0, 3)
        one.save(directory / name / "one", step=3)
        alone[name] = {
            "validation": one.validate(),
            "resumed_from_one_process": one.train(3, 5),
            "continued": one.train(5, 7),
        }
    return directory, alone, results_of(WORKER, directory)


CASES = [(model, layout) for model in ("plain", "mtp") for layout in worker.layouts_of(model)]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_run_resumes_at_another_layout(runs, model, layout):
    alone, found = runs[1][model], runs[2][model][layout]
    assert found["validation"] == pytest.approx(alone["validation"], rel=TOLERANCE)
    for part in ("resumed_from_one_process", "continued"):
        assert all((mtp > 0) == (model == "mtp") for _, mtp, _ in found[part])
        for ours, theirs in zip(found[part], alone[part], strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], rel=TOLERANCE)
            assert ours[2] == pytest.approx(theirs[2], rel=100 * TOLERANCE)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_same_layout_resumes_bit_for_bit(runs, model, layout):
    found = runs[2][model][layout]
    assert found["restored"] == found["continued"]


def test_dropout_goes_on_at_the_same_uneven_stages_and_starts_anew_at_others(runs):
    found = runs[2]["dropout"]
    assert found["restored"] == found["continued"]
    assert found["seeded, kept"] == [True, False]
    assert found["other"] != found["continued"]
    # Other elements are dropped of the same weights; without dropout the losses would be equal within TOLERANCE.
    assert found["other"][0][0] == pytest.approx(found["continued"][0][0], rel=0.2)


@pytest.mark.parametrize("layout", ["data", "tensor", "virtual_pipeline"])
def test_one_process_resumes_what_two_saved(runs, tiny_run, layout):
    directory, alone, _ = runs
    losses = [loss for loss, *_ in worker.Session(*tiny_run, directory / "plain" / layout).train(5, 7)]
    assert losses == pytest.approx([loss for loss, *_ in alone["plain"]["continued"]], rel=TOLERANCE)


def test_the_run_compared_learns(runs):
    """So that layouts which all do nothing would not pass for equal ones."""
    for alone in runs[1].values():
        assert alone["continued"][-1][0] < alone["validation"] - 0.1
    assert runs[1]["mtp"]["continued"][-1][1] < runs[1]["mtp"]["resumed_from_one_process"][0][1]
