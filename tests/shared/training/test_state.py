"""A run may be taken up in another layout, and in the same layout goes on bit for bit."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("layouts_worker.py")
specification = importlib.util.spec_from_file_location("training_layouts_worker", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)

# Layouts add the same fp32 numbers in another order. Adam turns such a difference where a gradient is near zero into a
# whole step of that weight; over the four updates compared here the losses stay within a few 1e-7 of each other.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def runs(start, tiny_run, start_ahead, ahead_run, tmp_path_factory):
    """(directory, one process's results, two processes' results): one spawn serves all tests and both models."""
    directory = tmp_path_factory.mktemp("layouts")
    alone = {}
    for name, (config, architecture), first in (("next", tiny_run, start), ("ahead", ahead_run, start_ahead)):
        given = {"config": asdict(config), "architecture": architecture.to_dict()}
        (directory / name).mkdir()
        (directory / name / "run.json").write_text(json.dumps(given))
        one = worker.Session(config, architecture, first, restore=False)
        one.train(0, 3)
        one.save(directory / name / "one", step=3)
        alone[name] = {"validation": one.validate(), "taken_up": one.train(3, 5), "went_on": one.train(5, 7)}
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(directory)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, alone, json.loads((directory / "results.json").read_text())


CASES = [(model, layout) for model in ("next", "ahead") for layout in worker.layouts_of(model)]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_another_layout_takes_a_run_up(runs, model, layout):
    alone, found = runs[1][model], runs[2][model][layout]
    assert found["validation"] == pytest.approx(alone["validation"], rel=TOLERANCE)
    for part in ("taken_up", "went_on"):
        assert all((further > 0) == (model == "ahead") for _, further, _ in found[part])
        for ours, theirs in zip(found[part], alone[part], strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], rel=TOLERANCE)
            assert ours[2] == pytest.approx(theirs[2], rel=100 * TOLERANCE)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_same_layout_goes_on_bit_for_bit(runs, model, layout):
    found = runs[2][model][layout]
    assert found["restored"] == found["went_on"]


@pytest.mark.parametrize("layout", ["data", "tensor", "virtual_pipeline"])
def test_one_process_takes_up_what_two_saved(runs, tiny_run, layout):
    directory, alone, _ = runs
    losses = [loss for loss, *_ in worker.Session(*tiny_run, directory / "next" / layout).train(5, 7)]
    assert losses == pytest.approx([loss for loss, *_ in alone["next"]["went_on"]], rel=TOLERANCE)


def test_the_run_compared_learns(runs):
    """So that layouts which all do nothing would not pass for equal ones."""
    for alone in runs[1].values():
        assert alone["went_on"][-1][0] < alone["validation"] - 0.1
    assert runs[1]["ahead"]["went_on"][-1][1] < runs[1]["ahead"]["taken_up"][0][1]
