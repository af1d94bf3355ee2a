import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.runtime.launch import launch

ROOT = Path(__file__).parents[3]
# No torch: a worker starts in milliseconds.
HEADER = """
import os, signal, sys, time
from pathlib import Path
from shared.runtime import launch
launch.GRACE_SECONDS = float(os.environ.get("GRACE_SECONDS", launch.GRACE_SECONDS))
code = launch.launch(int(sys.argv[1]))
if code is not None:
    sys.exit(code)
rank = int(os.environ.get("RANK", "0"))
here = Path(__file__).parent
"""
# For workers that wait in vain for one that has failed.
SHORT = {"GRACE_SECONDS": "0.2"}


@pytest.fixture
def start(tmp_path):
    """A function from a worker's program to its launcher's process, started for `processes` workers."""
    started = []

    def run(body, processes=2, **environment):
        script = tmp_path / "script.py"
        script.write_text(HEADER + body)
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "OMP_NUM_THREADS")}
        process = subprocess.Popen(
            [sys.executable, str(script), str(processes), "--word", "a b"],
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests in a shell's background inherit an ignored SIGINT, which a launcher leaves ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 -- a single thread
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(process, seconds=30):
    began = time.monotonic()
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors, time.monotonic() - began


def wait_for(*paths):
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_get_their_place_and_the_same_command_line(start, tmp_path):
    code, output, errors, _ = finish(
        start(
            "names = 'WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_RANK MASTER_ADDR'.split()\n"
            "(here / f'{rank}').write_text(' '.join([*(os.environ[n] for n in names), *sys.argv[1:]]))\n"
            "(here / f'port-{rank}').write_text(os.environ['MASTER_PORT'])\n"
            "print('from', rank)\n",
            processes=3,
        )
    )
    assert (code, output, errors) == (0, "from 0\n", "")
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"3 3 {rank} 127.0.0.1 3 --word a b"
    assert len({(tmp_path / f"port-{rank}").read_text() for rank in range(3)}) == 1


def test_cores_are_shared_out_unless_told_otherwise(start, tmp_path):
    body = "(here / f'{rank}').write_text(os.environ['OMP_NUM_THREADS'])\n"
    assert finish(start(body))[0] == 0
    assert (tmp_path / "0").read_text() == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert finish(start(body, OMP_NUM_THREADS="7"))[0] == 0
    assert (tmp_path / "1").read_text() == "7"


def test_one_process_is_the_caller_itself(start, tmp_path):
    code, output, _, _ = finish(start("print(os.environ.get('RANK'))", processes=1))
    assert (code, output) == (0, "None\n")


@pytest.mark.parametrize("processes", [4, None])
def test_a_worker_launches_nothing(monkeypatch, processes):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch(processes) is None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cluster_that_started_another_number_is_refused(monkeypatch, processes):
    """With 1, every rank would train alone, on the same samples."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=f"--processes {processes}, but the launcher of this job started 4"):
        launch(processes)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("processes", [1, 2, None])
def test_a_cluster_that_sets_no_rank_is_refused(monkeypatch, processes, name):
    """Each task would be a run of its own."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=rf"2 tasks of this job run the same command \({name}\), and none has RANK"):
        launch(processes)
    monkeypatch.setenv(name, "1")
    assert processes == 2 or launch(processes) is None


def test_no_processes_is_a_mistake():
    with pytest.raises(UserError, match="--processes must be at least 1, not 0"):
        launch(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_worker_ends_the_job_with_its_error(rank, start):
    code, _, errors, seconds = finish(
        start(f"if rank == {rank}:\n    raise ValueError('out of cheese')\ntime.sleep(300)", **SHORT)
    )
    assert code == 1
    assert "ValueError: out of cheese" in errors
    assert seconds < 20


def test_a_users_mistake_keeps_its_code_and_is_told_once(start):
    body = "time.sleep(0.5 * (rank == 0))\nprint('no such flag', file=sys.stderr)\nsys.exit(2)"
    code, _, errors, _ = finish(start(body))
    assert code == 2
    assert errors.count("no such flag") == 1


def test_a_killed_worker_is_named(start):
    code, _, errors, seconds = finish(
        start("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(300)", **SHORT)
    )
    assert code == 1
    assert "worker 1 was killed by SIGKILL" in errors
    assert seconds < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_worker_once_and_75_comes_back(number, start, tmp_path):
    process = start(
        "def save(number, frame):\n"
        "    with open(here / f'got-{rank}', 'a') as file: file.write(f'{number} ')\n"
        "    time.sleep(0.5 * rank)\n"
        "    (here / f'saved-{rank}').touch()\n"
        "    sys.exit(75)\n"
        f"signal.signal({int(number)}, save)\n"
        "(here / f'ready-{rank}').touch()\n"
        "time.sleep(300)\n"
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(number)
    code, _, errors, _ = finish(process)
    assert (code, errors) == (75, "")
    for rank in range(2):
        assert (tmp_path / f"got-{rank}").read_text() == f"{int(number)} "
        assert (tmp_path / f"saved-{rank}").exists()


def test_workers_die_with_a_launcher_that_is_killed(start, tmp_path):
    process = start(
        "(here / f'pid-{rank}').write_text(str(os.getpid()))\n(here / f'ready-{rank}').touch()\ntime.sleep(300)"
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    for rank in range(2):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        while time.monotonic() < deadline:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            # A zombie that init has not reaped yet is dead, too.
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"worker {rank} outlived its launcher")


def test_a_worker_that_left_with_0_before_the_others_is_named(start):
    body = "if rank == 1:\n    print('bye')\n    sys.exit()\ntime.sleep(1)\nraise RuntimeError('connection closed by peer')"
    code, _, errors, _ = finish(start(body, **SHORT))
    assert code == 1
    assert "connection closed by peer" in errors
    assert "[rank 1] bye" in errors
    assert "worker 1 had ended before that with exit code 0" in errors
