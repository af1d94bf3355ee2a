"""`make bench-data` runs and says what it compares; its figures are of a small text here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

BENCHMARK = Path(__file__).with_name("bench_data.py")
PYTHON = Path(__file__).parents[2] / "tools/pretrain/.venv/bin/python"


def test_every_way_is_measured(tmp_path: Path) -> None:
    train = (
        "from tools.pretrain.train_bpe import train, write; from pathlib import Path; "
        f"folder = Path({str(tmp_path / 'tokenizer')!r}); folder.mkdir(); write(train(iter(['some text']), 300), folder)"
    )
    root = BENCHMARK.parents[2]
    subprocess.run([PYTHON, "-c", train], cwd=root, check=True)
    rows = "".join(json.dumps({"text": f"some text {number} " * 20}) + "\n" for number in range(500))
    (tmp_path / "text-1.jsonl").write_text(rows)
    words = ["--work", tmp_path, "--megabytes", "1", "--tokenizer", tmp_path / "tokenizer", "--workers", "1"]
    answer = subprocess.run(
        [PYTHON, BENCHMARK, *words, "--results", tmp_path, "--record"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads((tmp_path / "data-cpu.json").read_text())["results"]
    assert set(found["MB/s"]) == {*("reading", "tokenizer", "both", "tokenizers", "prepare", "command", "Megatron-LM")}
    assert all(rate > 0 for rate in found["MB/s"].values())
    assert found["MB/s"]["both"] < min(found["MB/s"]["reading"], found["MB/s"]["tokenizer"])
    assert found["MB/s"]["command"] < found["MB/s"]["prepare"] < found["MB/s"]["reading"]
    assert "| prepare |" in answer.stdout
    # the loop of Megatron-LM gives the same file
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"megatron.{suffix}").read_bytes() == (tmp_path / "data" / f"train.{suffix}").read_bytes()
