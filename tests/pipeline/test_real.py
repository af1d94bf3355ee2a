"""The demo of a real model with a tiny one in its place: every stage of `sft` up to the merged model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .conftest import Baton

ROOT = Path(__file__).resolve().parents[2]


def test_every_stage_up_to_the_merged_model(baton: Baton, tmp_path: Path) -> None:
    config = json.loads((ROOT / "demo/model.json").read_text())
    config |= {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    (tmp_path / "model.json").write_text(json.dumps(config))
    tokenizer, source, work = tmp_path / "tokenizer", tmp_path / "hf", tmp_path / "work"
    baton("pretrain", "tokenizer", "--source", ROOT / "demo/README.md", "--target", tokenizer, "--vocab-size", 512)
    baton("convert", "init", "--model-config", tmp_path / "model.json", "--tokenizer", tokenizer, "--target", source)
    command = [
        sys.executable,
        "demo/real",
        "--work",
        str(work),
        "--source",
        str(source),
        "--until",
        "convert merge-lora",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "=== data: 308 questions, 40 held out" in done.stdout
    merged, adapter = (
        json.loads((work / name / "manifest.json").read_text())["facts"] for name in ("merged", "adapter")
    )
    assert merged["parameters"] > 0
    assert adapter
    record = json.loads((work / "demo.json").read_text())["stages"]
    assert list(record)[-1] == "convert merge-lora"
    assert "fetch" not in record
    assert all(stage["finished"] and stage["cpu_seconds"] > 0.02 for stage in record.values())
