"""The benchmark of attention measures each back end and marks memory that is not linear: `make bench-attention`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import bench_attention
from tests.benchmarks.bench_attention import RESULTS, ROWS, more_than_linear
from tests.benchmarks.bench_train import record_path

BENCHMARK = Path(__file__).with_name("bench_attention.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def found(*bytes_: float) -> dict:
    """Of rows of 1,000, 2,000, ... tokens."""
    each = {str(1000 * 2**index): {"segments": {"seconds": 1.0, "bytes": size}} for index, size in enumerate(bytes_)}
    return {"packed": each}


def test_a_measurement_is_of_a_process_of_its_own() -> None:
    """Whatever the memory of the process that starts it."""
    large = bytearray(b"1" * 2**30)
    words = [PYTHON, BENCHMARK, "--one", "1500", "packed, sinks", "segments"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    del large
    assert answer.returncode == 0, answer.stderr
    figures = json.loads(answer.stdout)
    assert figures["seconds"] > 0
    # Gradients of q, k and v are kept: 16 heads x 64 x 1500 numbers.
    assert figures["bytes"] > 4 * 16 * 64 * 1500


def test_every_row_is_recorded_and_eager_is_left_out_of_long_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: list[str], **named: object) -> subprocess.CompletedProcess[str]:
        figures = {"seconds": 2.0, "bytes": int(words[3]) * 2**10}
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(figures))

    monkeypatch.setattr(bench_attention.subprocess, "run", run)
    monkeypatch.setattr(bench_attention, "machine", lambda *packages: {"device": "CPU"})
    words = ["--tokens", "4096", "8192", "--results", str(tmp_path), "--record"]
    assert bench_attention.main(words) == 0
    results = json.loads((tmp_path / "attention-cpu.json").read_text())["results"]
    assert list(results) == list(ROWS)
    assert [list(each) for each in results["window"].values()] == [["segments", "eager"], ["segments"]]
    printed = capsys.readouterr().out
    assert re.search(r"^\| packed, ALiBi \| 8,192 \| - \| 2.00 \| - \| 8 \|$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("bytes_", "marks"), [((9, 1000, 2000), 0), ((9, 1000, 2190), 0), ((9, 1000, 2210), 1), ((9, 1000, 4000), 1)]
)
def test_memory_that_is_not_linear_is_marked(
    bytes_: tuple[int, ...], marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(more_than_linear(found(*bytes_))) == marks
    monkeypatch.setattr(bench_attention, "measured", lambda tokens: found(*bytes_))
    monkeypatch.setattr(bench_attention, "machine", lambda *packages: {"device": "CPU"})
    assert bench_attention.main([]) == marks


def test_records_are_linear() -> None:
    for path in RESULTS.glob("attention-*.json"):
        content = json.loads(path.read_text())
        assert record_path(content["machine"], of="attention") == path
        assert more_than_linear(content["results"]) == []
