"""The benchmark makes the same update in each way and marks what is slower; `make bench-train` gives the figures."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_train
from tests.benchmarks.bench_train import (
    RESULTS,
    SHAPES,
    WAYS,
    interval,
    over_the_goal,
    record_path,
    regressions,
    table,
)

BENCHMARK = Path(__file__).with_name("bench_train.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"
FOUND = {
    "1m": {
        **{way: {"seconds": 0.2, "tokens_per_second": 10_000.0, "last_loss": 3.0} for way in WAYS},
        **{f"{way}/loop": 1.0 for way in WAYS[1:]},
        **{f"{way}/loop, 95%": [0.99, 1.01] for way in WAYS[1:]},
    }
}


def changed(**figures: float) -> dict:
    """The results with other figures of the loop."""
    found = copy.deepcopy(FOUND)
    for name, value in figures.items():
        if name == "tokens_per_second":
            found["1m"]["loop"][name] = value
        else:
            found["1m"][f"{name}/loop"] = value
    return found


def test_each_way_trains_and_the_record_is_replaced(tmp_path: Path) -> None:
    impossible = {"tiny": {"loop": {"tokens_per_second": 1.0}, "megatron/loop": 1e9, "transformers/loop": 0.0}}
    (tmp_path / "train-cpu.json").write_text(json.dumps({"machine": {"device": "CPU"}, "results": impossible}))
    words = [PYTHON, BENCHMARK, "--size", "tiny", "--updates", "3", "--results", tmp_path, "--record"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert re.findall("REGRESSION (.*?) [0-9]", answer.stdout) == ["tiny: megatron/loop"]
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    result = content["results"]["tiny"]
    assert {"device", "cpu", "cores", "torch", "megatron-core", "transformers"} <= content["machine"].keys()
    # Untrained, so near the logarithm of the vocabulary in each way.
    assert [result[way]["last_loss"] for way in WAYS] == [pytest.approx(4.85, abs=0.1)] * 3
    assert re.search(r"^\| tiny \| [\d,]+ \| [\d,]+ \| [\d,]+ \| [+-][\d.]+% \| [+-][\d.]+% \|$", answer.stdout, re.M)


def test_a_regression_is_the_exit_code_and_changes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "measure", lambda name, updates: changed(tokens_per_second=9_000.0)[name])
    monkeypatch.setattr(bench_train, "machine", lambda: {"device": "CPU"})
    file = tmp_path / "train-cpu.json"
    words = ["--size", "1m", "--results", str(tmp_path)]
    assert bench_train.main(words) == 0  # nothing is recorded yet
    file.write_text(json.dumps({"machine": {"device": "CPU"}, "results": FOUND}))
    assert bench_train.main(words) == 1
    assert json.loads(file.read_text())["results"] == FOUND
    file.write_text(json.dumps({"machine": {"device": "CPU", "cores": 64}, "results": FOUND}))
    assert bench_train.main(words) == 0  # of another machine only ratios are compared


@pytest.mark.parametrize(
    ("figures", "same_machine", "marks"),
    [
        ({}, True, 0),
        ({"tokens_per_second": 9_600.0, "megatron": 0.96}, True, 0),
        ({"tokens_per_second": 9_400.0}, True, 1),
        ({"tokens_per_second": 9_400.0}, False, 0),
        ({"megatron": 0.94, "transformers": 0.94}, False, 2),
        ({"tokens_per_second": 20_000.0, "megatron": 2.0}, True, 0),
    ],
)
def test_what_is_five_percent_worse_is_marked(figures: dict, same_machine: bool, marks: int) -> None:
    assert len(regressions(changed(**figures), FOUND, same_machine=same_machine)) == marks
    assert regressions({"new": FOUND["1m"]}, FOUND, same_machine=True) == []


@pytest.mark.parametrize(("number", "end"), [(3, 0), (5, 0), (6, 0), (15, 3), (21, 5), (41, 13)])
def test_an_interval_holds_the_median_19_times_of_20(number: int, end: int) -> None:
    """Against the table of the binomial distribution: six are the fewest of which both ends hold it so often."""
    assert interval(list(range(number))) == (end, number - 1 - end)


def test_what_is_above_the_goal_is_said() -> None:
    assert over_the_goal(changed(megatron=0.981)) == []
    assert over_the_goal(changed(megatron=0.96)) == ["1m: +4.2% over megatron (-1.0% to +1.0%), goal 2%"]


def test_the_table_says_how_much_longer_the_loop_takes() -> None:
    last = table(changed(megatron=0.8, transformers=1.25)).splitlines()[-1]
    assert last == "| 1m | 10,000 | 10,000 | 10,000 | +25.0% | -20.0% |"


def test_records_are_kept_by_device() -> None:
    assert record_path({"device": "NVIDIA H100 80GB HBM3"}).name == "train-nvidia-h100-80gb-hbm3.json"
    for path in RESULTS.glob("train-*.json"):
        content = json.loads(path.read_text())
        assert record_path(content["machine"]) == path
        assert content["results"].keys() <= SHAPES.keys()
