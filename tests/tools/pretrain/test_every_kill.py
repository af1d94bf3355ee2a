"""SIGKILL at random moments of training and saving: nothing is lost, and all later numbers are equal bit for bit.

Half of the runs save asynchronously.

`BATON_KILLS=200` kills that often; by default 12 times, for the time it takes.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from tests.tools.pretrain.runs import words
from tests.training_runs import record, tensors

KILLS = int(os.environ.get("BATON_KILLS", "12"))


def test_sigkill_at_random_moments_loses_nothing(whole, source, data, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    command = [word for word in words(source, data, tmp_path / "run", save_every=2) if not word.startswith("--target")]
    worker = Path(__file__).with_name("kill_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(KILLS), str(seed), tmp_path / "run", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 30 * KILLS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] == KILLS
    assert told["asynchronous"] >= KILLS // 4
    assert told["after a save"] >= KILLS // 4
    expected = tensors(whole)
    for index in range(told["runs"]):
        run = tmp_path / f"run-{index}"
        assert record(run) == record(whole)
        found = tensors(run)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
