"""Ranks that hang: named with their phase and stack, and the job ends. The ranks import no torch, and hang for real."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.runtime import watch
from shared.runtime.watch import Watch, Watched

ROOT = Path(__file__).parents[3]
HEADER = """
import os, signal, sys, time
from pathlib import Path
from shared.runtime import launch, progress
progress.FIRST_UPDATE_SECONDS = 1.0
code = launch.launch(int(sys.argv[1]))
if code is not None:
    sys.exit(code)
rank = int(os.environ["RANK"])
sys.path.insert(0, str(Path(__file__).parent))
progress.begin(1)
"""


@pytest.fixture
def end_of(tmp_path):
    """A function from a program of two ranks to exit code, standard error and seconds."""

    def run(body, processes=2, **environment):
        script = tmp_path / "script.py"
        script.write_text(HEADER + body)
        kept = {name: value for name, value in os.environ.items() if name != "RANK"}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, script, str(processes)],
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stderr, time.monotonic() - began

    return run


def test_a_rank_stuck_in_its_data_is_named_and_those_that_wait_for_it_are_not(end_of):
    """A thread reads, as in training."""
    code, told, seconds = end_of(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(2)\n"
        "pool.submit(time.sleep, 0).result()\n"
        "def stuck_reader():\n    time.sleep(300)\n"
        "progress.update(5)\n"
        "if rank == 1:\n    pool.submit(stuck_reader).result()\n"
        "progress.at('forward and backward')\n"
        "time.sleep(300)\n"
    )
    assert code == 1
    assert told.startswith(
        "rank 1 hangs: for 1 s in 'update 5: reading the data', which may take 1 s (--hang-timeout)\n"
    )
    trains, _, reads = told.partition("[rank 1]   a thread:\n")
    assert trains.splitlines()[-1].endswith("in <module>")
    assert "in result\n" in trains
    assert reads.splitlines()[0].endswith("in stuck_reader")
    assert "a thread:" not in reads  # those that wait for work
    assert "rank 0" not in told
    assert seconds < 60


def test_a_stopped_rank_is_named_in_any_phase(end_of):
    """SIGSTOP while it loads, which may take half an hour. Its stack comes, too."""
    code, told, _ = end_of(
        "progress.at('loading', long=True)\n"
        "if rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "while rank == 0:\n    progress.beat(); time.sleep(0.1)\n"
        "time.sleep(300)\n"
    )
    assert code == 1
    assert re.match(
        r"rank 1 hangs: for \d+ s in 'loading', which may take 1 s; it is stopped, by SIGSTOP or a debugger", told
    )
    assert "[rank 1]   File" in told
    assert "rank 0" not in told


def test_of_ranks_in_one_phase_those_in_a_collective_wait(end_of, tmp_path):
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    (tmp_path / "torch" / "distributed" / "collective.py").write_text("import time\ndef wait():\n    time.sleep(300)\n")
    (tmp_path / "torch" / "__init__.py").touch()
    body = (
        "from torch.distributed.collective import wait\nprogress.update(1)\nprogress.at('forward and backward')\n"
        "if rank == 0:\n    wait()\n"
        "time.sleep(300)\n"
    )
    code, told, _ = end_of(body)
    assert code == 1
    assert told.startswith("rank 1 hangs: ")
    assert "rank 0" not in told
    told = end_of(body.replace("rank == 0", "rank >= 0"))[1]  # all wait: nobody knows for whom
    assert "rank 0 hangs: " in told
    assert "rank 1 hangs: " in told


def test_progress_within_a_phase_counts_and_nobody_is_watched_after_the_end(end_of):
    code, told, _ = end_of(
        "progress.update(1)\nfor _ in range(20):\n    progress.beat(); time.sleep(0.1)\nprogress.end()\ntime.sleep(2)\n"
    )
    assert (code, told) == (0, "")


def test_a_rank_of_another_launcher_is_watched_by_a_process_of_its_own(end_of):
    """torchrun and Slurm end the job when a rank is killed."""
    code, told, seconds = end_of(
        "progress.update(2)\ntime.sleep(300)\n", processes=4, RANK="3", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1"
    )
    assert code == -signal.SIGKILL
    assert re.match(r"rank 3 hangs: for [12] s in 'update 2: reading the data', which may take 1 s", told)
    assert "[rank 3]   File" in told
    assert seconds < 60


@pytest.mark.parametrize("gap", [0.3, 1000.0])
def test_time_in_which_the_watcher_does_not_run_is_not_counted(gap, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    ranks = [Watched.of(0, os.getpid(), tmp_path)]
    (tmp_path / "rank-0.progress").write_text('{"beat": 1, "phases": 1, "phase": "x", "limit": 60, "timeout": 60}')
    watching = Watch(ranks)
    for _ in range(100):
        now[0] += gap
        assert watching.hanging() is None
    assert ranks[0].silent == pytest.approx(99 * min(gap, 2 * watch.LOOK_SECONDS))
