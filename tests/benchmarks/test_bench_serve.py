"""The benchmark of serving: ratios, interval, marks. test_every_upstream.py of infer has its servers' command lines."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import bench_serve
from tests.benchmarks.bench_serve import (
    FIGURES,
    GOAL,
    JUDGED,
    RESULTS,
    WAYS,
    interval,
    misses,
    order,
    overhead,
    summary,
    table,
)
from tests.benchmarks.bench_train import record_path
from tests.benchmarks.measured import processor, tree
from tools.infer.drain import InFlight

RUN: dict[str, Any] = {
    "requests": 64,
    "seconds": 2.0,
    "output_tokens_per_second": 100.0,
    "processor_ms": 20.0,
    "ttft_ms": {"p99": 10.0},
    "tpot_ms": {"p99": 2.0},
    "e2el_ms": {"p50": 40.0, "p99": 50.0},
}


def run(throughput: float = 100.0, p99: float = 50.0, processor: float = 20.0) -> dict[str, Any]:
    found = copy.deepcopy(RUN) | {"output_tokens_per_second": throughput, "processor_ms": processor}
    found["e2el_ms"]["p99"] = p99
    return found


def block(infer: dict[str, Any], vllm: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"infer": [infer, infer], "vllm": [vllm or RUN] * 2, "load_average": 1.0}


def test_an_overhead_is_how_much_worse_infer_is() -> None:
    assert overhead(block(run(throughput=80.0)), "throughput") == pytest.approx(0.25)
    assert overhead(block(RUN, run(throughput=80.0)), "throughput") == pytest.approx(-0.2)
    assert overhead(block(run(p99=60.0)), "e2el_p99") == pytest.approx(0.2)
    assert overhead(block(RUN, run(p99=100.0)), "e2el_p99") == pytest.approx(-0.5)
    assert overhead(block(run(processor=21.0)), "processor") == pytest.approx(0.05)
    assert overhead(block(RUN), "ttft_p99") == overhead(block(RUN), "tpot_p99") == 0


def test_what_rises_within_a_block_cancels() -> None:
    """The machine becomes slower by the same amount from run to run: no way is worse for it."""
    for number in range(2):
        runs: dict[str, Any] = {way: [] for way in WAYS}
        for turn, way in enumerate(order(number)):
            runs[way].append(run(p99=50.0 + 10 * turn))
        assert overhead(runs, "e2el_p99") == 0
    assert order(0) != order(1)
    assert order(0)[:2] == tuple(WAYS)


def test_the_own_part_of_a_reply_is_that_of_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < bench_serve.own_ms(rounds=200) < 0.2
    counted = InFlight.counted

    async def slow(self: InFlight, scope: Any, receive: Any, send: Any) -> None:
        until = time.process_time() + 0.001
        while time.process_time() < until:
            pass
        await counted(self, scope, receive, send)

    monkeypatch.setattr(InFlight, "counted", slow)
    assert 1 < bench_serve.own_ms(rounds=50, repeats=2) < 1.5


def test_the_processor_time_of_a_tree_is_that_of_its_processes() -> None:
    busy = "import os, time\nfor _ in 'ab': os.fork()\nwhile time.process_time() < 0.3: pass\nprint(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout
        for _ in range(4):
            child.stdout.readline()
        assert 1.1 < processor(tree(child.pid)) < 2
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.parametrize(("count", "first"), [(3, 0), (5, 0), (6, 0), (12, 2), (20, 5), (100, 39)])
def test_the_interval_is_that_of_the_sign_test(count: int, first: int) -> None:
    """Positions as tabulated for the median (Conover, Practical Nonparametric Statistics, table of the binomial)."""
    values = [float(value) for value in range(count)]
    assert interval(values[::-1]) == (first, count - 1 - first)


def test_only_what_is_beyond_the_goal_at_the_kinder_end_is_marked() -> None:
    sure = summary([block(run(throughput=90.0))] * 12)
    assert len(misses(sure)) == 1
    assert misses(sure)[0].startswith("throughput: +11.1%")
    p99 = summary([block(run(p99=52.0))] * 12)
    assert [each.partition(":")[0] for each in misses(p99)] == ["e2el_p99"]
    for name in ("ttft", "tpot"):
        slow = copy.deepcopy(RUN)
        slow[f"{name}_ms"]["p99"] *= 1.1
        assert [each.partition(":")[0] for each in misses(summary([block(slow)] * 12))] == [f"{name}_p99"]
    noise = [block(run(throughput=100.0 + 10 * (-1) ** number)) for number in range(12)]
    assert misses(summary(noise)) == []
    assert misses(summary([block(run(throughput=98.5))] * 12)) == []


def test_the_medians_and_the_table() -> None:
    blocks = [block(run(throughput=value)) for value in (50.0, 80.0, 100.0)]
    found = summary(blocks)["throughput"]
    assert found == {"overhead": 0.25, "interval": [0.0, 1.0], "infer": 80.0, "vllm": 100.0}
    rows = table({"tiny": summary(blocks)}).splitlines()
    assert "| tiny | throughput | 80.00 | 100.00 | +25.0% | +0.0% to +100.0% |" in rows


def test_a_miss_is_the_exit_code_and_blocks_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = []

    def measure(size: str, blocks: int, requests: int, seed: int) -> list[dict[str, Any]]:
        seeds.append(seed)
        return [block(made)] * blocks

    monkeypatch.setattr(bench_serve, "measure", measure)
    monkeypatch.setattr(bench_serve, "own_ms", lambda: 0.01)
    monkeypatch.setattr(bench_serve, "machine", lambda *packages: {"device": "CPU"})
    words = ["--size", "tiny", "--results", str(tmp_path)]
    made = run(throughput=50.0)
    assert bench_serve.main(words) == 1
    assert not list(tmp_path.iterdir())
    made = RUN
    assert bench_serve.main([*words, "--record"]) == 0
    path = tmp_path / "serve-cpu.json"
    content = json.loads(path.read_text())
    assert content["machine"] == {"device": "CPU"}
    assert content["results"]["tiny"]["throughput"]["overhead"] == 0
    made = run(throughput=50.0)
    assert bench_serve.main([*words, "--add", "--blocks", "99"]) == 1
    content = json.loads(path.read_text())
    assert content["results"]["tiny"]["blocks"] == 111
    assert content["results"]["tiny"]["throughput"]["overhead"] == 1.0
    assert len(set(seeds[1:])) == 2, "the same prompts twice"
    assert content["own_share"] == {"tiny": 0.0005}
    monkeypatch.setattr(bench_serve, "own_ms", lambda: 1.0)
    made = RUN
    assert bench_serve.main(words) == 1
    assert "BEYOND 2% tiny: infer's own code 5.0%" in capsys.readouterr().out
    path.write_text(json.dumps(content | {"machine": {"device": "another"}}))
    with pytest.raises(SystemExit):
        bench_serve.main([*words, "--add"])
    assert "was measured on {'device': 'another'}; give --record" in capsys.readouterr().err


def test_records_are_whole() -> None:
    for path in RESULTS.glob("serve-*.json"):
        content = json.loads(path.read_text())
        assert record_path(content["machine"], of="serve") == path
        assert content["load_average"].keys() == {"least", "most"}
        for size, result in content["results"].items():
            assert set(JUDGED) <= FIGURES.keys()
            assert content["own_share"][size] < GOAL
            assert result == {"blocks": len(content["blocks"][size]), **summary(content["blocks"][size])}
