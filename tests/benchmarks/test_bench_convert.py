"""The benchmark runs and measures correctly; `make bench-convert` gives the figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measured import measure

BENCHMARK = Path(__file__).with_name("bench_convert.py")


def test_it_prints_a_table_and_cleans_up(tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = [sys.executable, BENCHMARK, "--shapes", "tiny", "--rounds", "1", "--peer-rounds", "0", "--work", work]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = re.findall(
        r"^\| (.*?) \| ([\d.]+) \(.*?\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$",
        answer.stdout,
        re.M,
    )
    assert [name for name, *_ in rows] == [
        "copy (`cp -r`)",
        "copy, and on the disk (`cp -r`, `sync`)",
        "mmap, and safetensors rewritten",
        "to-megatron",
        "to-hf",
        "to-megatron, without hashes",
        "to-hf, without hashes",
    ]
    figures = {name: [float(figure) for figure in rest] for name, *rest in rows}
    assert figures["copy (`cp -r`)"][1] == 1.0
    assert figures["mmap, and safetensors rewritten"][3] == 1.0
    assert "Not measured: Megatron-Bridge" in answer.stdout
    for name in ("to-megatron", "to-hf"):
        seconds, _, _, _, processor, memory = figures[name]
        assert seconds > 0.1
        assert processor > 0.1
        assert 15 < memory < 100
    assert not work.exists()


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "held = bytearray(b'x') * (40 << 20)\n"
        "if len(sys.argv) == 1: subprocess.run([sys.executable, __file__, 'child'])\n"
        "else: time.sleep(0.3)\n"
    )
    found = measure([sys.executable, program])
    assert 80 << 20 < found.memory < 130 << 20
    assert found.seconds > 0.3


def test_memory_that_a_forked_process_shares_counts_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\nheld = bytearray(b'x') * (80 << 20)\nif os.fork(): os.wait()\nelse: time.sleep(0.5)\n"
    )
    assert 80 << 20 < measure([sys.executable, program]).memory < 130 << 20


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 3: no such weights"):
        measure([sys.executable, "-c", "print('no such weights'); raise SystemExit(3)"], first_to_end=True)
