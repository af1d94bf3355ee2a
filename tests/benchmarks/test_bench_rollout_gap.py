"""The benchmark of the roll-out gap: its verdicts, and a short run whose server is a stand-in for vLLM's on transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import bench_rollout_gap as bench
from tests.tools.rlhf.rollout.rollout_server import serving


def rows(gap: float, *, count: int = 200, rise: float = 0.0) -> list[dict[str, float]]:
    """metrics.jsonl: gaps with noise of a tenth, and what they have risen by at the end."""
    chance = random.Random(0)
    gaps = [gap * chance.gauss(1, 0.1) + rise * step / count for step in range(count)]
    return [
        {"log_prob_gap": value, "log_prob_gap_max": 4 * value, "reward": step / count}
        for step, value in enumerate(gaps)
    ]


def test_the_line_and_its_error_are_those_of_numpy() -> None:
    values = [row["log_prob_gap"] for row in rows(2e-7, count=60, rise=1e-7)]
    blocks = np.asarray(values).reshape(bench.BLOCKS, -1).mean(axis=1)
    places = (np.arange(bench.BLOCKS) + 0.5) * 3 / 100
    (slope, _), covariance = np.polyfit(places, blocks, 1, cov=True)
    found = bench.slope(values)
    assert found["per_100"] == pytest.approx(slope, rel=1e-9)
    assert found["error"] == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-9)
    assert bench.mean(values) == {
        "mean": pytest.approx(np.mean(values)),
        "error": pytest.approx(np.std(blocks, ddof=1) / bench.BLOCKS**0.5),
    }
    assert bench.slope(values[:2]) == {"per_100": None, "error": None}


@pytest.mark.parametrize(
    ("rate", "run", "fresh", "wrong"),
    [
        (0.0, rows(2e-7), [], []),
        (0.0, rows(2e-7, rise=2e-7), [], ["rate 0: the gap rises by 1"]),
        (0.0, rows(2e-5), [], ["rate 0: mean gap 2.0e-05, the limit is 1e-05"]),
        (1e-4, rows(2e-7, rise=2e-7), rows(3.8e-7, count=50), []),  # the rounding of the last policy
        (1e-4, rows(2e-7, rise=2e-7), rows(2e-7, count=50), ["standard errors above the gap of a fresh server"]),
        (1e-4, rows(2e-7), rows(2e-7, count=50), []),
    ],
)
def test_what_a_run_is_not(rate: float, run: Any, fresh: Any, wrong: list[str]) -> None:
    said = bench.failures(bench.figures(rate, run, fresh))
    assert len(said) == len(wrong), said
    assert all(words in line for words, line in zip(wrong, said, strict=True))


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlhf grpo` takes the flags, publishes before each update, and trains."""
    published = []

    @contextmanager
    def stand_in(policy: Path) -> Iterator[str]:
        with serving(policy) as server:
            server.max_model_len = bench.PROMPT + 20
            yield server.url
            published.append(len(server.published))

    monkeypatch.setattr(bench, "served", stand_in)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "fresh-0.01").mkdir()  # a finished run is not repeated
    (tmp_path / "fresh-0.01" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows(2e-7, count=2))
    )
    (run,) = bench.measure(tmp_path, [1e-2], 3)
    assert published == [3, 0]
    assert (run["learning_rate"], run["steps"]) == (1e-2, 3)
    assert 0 < run["gap"]["mean"] <= run["gap_largest_update"] <= run["gap_largest_token"] < 1e-4
    assert run["gap"]["mean"] < bench.LIMIT
    assert run["gap_fresh"]["mean"] == pytest.approx(2e-7, rel=0.2)
