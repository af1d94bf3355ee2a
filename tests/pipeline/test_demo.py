"""The demo's driver on its cheap stages: killed anywhere, the same command resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAST = "pretrain prepare"


def demo(work: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "demo/demo.py", "--work", str(work), "--until", LAST]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_anywhere_and_run_again_it_finishes(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(2):
        process = demo(tmp_path)
        time.sleep(chance.uniform(0.5, 8))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = demo(tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text())["facts"]["splits"]["train"]["tokens"] > 10**6
    process = demo(tmp_path)
    again, _ = process.communicate()
    assert process.returncode == 0
    assert again.count("already done") == again.count("\n$ ") - 1, again  # a certificate is made anew
    assert not [path for path in tmp_path.rglob("*") if ".partial-" in path.name]
