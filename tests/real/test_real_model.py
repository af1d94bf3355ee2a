"""What only a pretrained model shows. `make test-real` fetches 93 MB and takes minutes; it is no part of `make test`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def start(work: Path, until: str) -> subprocess.Popen[str]:
    words = [sys.executable, "demo/real.py", "--work", str(work), "--until", until]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(work: Path, until: str) -> str:
    process = start(work, until)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def test_the_round_trip_is_exact_and_logits_agree(work: Path) -> None:
    run(work, "convert verify")
    certificate = json.loads((work / "certificate.json").read_text())
    assert certificate["tensors"] == 272
    assert certificate["logits"]["max_difference"] < 1e-3  # fp32 over 30 layers; 5.7e-5 was measured


def test_it_knows_the_capital_of_france(work: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "What is the capital of France?"}]}) + "\n")
    command = [
        str(ROOT / "tools/infer/.venv/bin/infer"),
        "generate",
        "--source",
        str(work / "hf"),
        "--prompts",
        str(prompts),
    ]
    subprocess.run(
        [*command, "--target", str(tmp_path / "out"), "--max-tokens", "16", "--max-model-len", "256"], check=True
    )
    (row,) = (tmp_path / "out/generations.jsonl").read_text().splitlines()
    assert "Paris" in json.loads(row)["completion"]


def test_killed_in_training_and_run_again_it_goes_on(work: Path) -> None:
    process = start(work, "sft train")
    metrics = work / "lora-mg" / "metrics.jsonl"
    deadline = time.monotonic() + 1800
    while not (list(work.glob("lora-mg*/iter_*5")) or process.poll() is not None):
        assert time.monotonic() < deadline
        time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    output = run(work, "sft train")
    assert "resum" in output, output
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines() if "loss" in json.loads(line)]
    assert losses[-1] < losses[0] / 3
