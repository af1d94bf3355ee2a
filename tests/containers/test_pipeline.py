"""containers/pipeline.py: the demo's first stages in real containers; signals, failures and repeats."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "containers" / ".venv" / "bin" / "python"
FIRST = ["data", "pretrain tokenizer", "convert init", "convert to-megatron"]

Done = subprocess.CompletedProcess


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    """The docker package."""
    if not (PYTHON.parent.parent / ".ready").exists():
        subprocess.run([ROOT / "tools" / "environment.sh", "containers"], cwd=ROOT, check=True)


def words(work: Path, *more: str) -> list[str]:
    return [str(PYTHON), "containers/pipeline.py", "--work", str(work), *more]


def run(work: Path, *more: str, code: int = 0, **variables: str) -> Done[str]:
    done = subprocess.run(
        words(work, *more), cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def complaint(done: Done[str]) -> str:
    """The one line that says why."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pipeline: ")
    return line


def left(work: Path) -> list[str]:
    """Containers that still stand for the work directory, running or not."""
    command = ["docker", "ps", "--all", "--quiet", "--filter", f"label=baton.pipeline={work}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


# What needs no engine.


@pytest.mark.parametrize("host", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:9", "nonsense"])
def test_no_engine_is_one_line(tmp_path: Path, host: str) -> None:
    line = complaint(run(tmp_path, code=2, DOCKER_HOST=host))
    assert "no Docker engine answers" in line
    assert host in line


def test_a_stage_that_is_none_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--until", "convert to-nowhere", code=2)
    assert "no stage 'convert to-nowhere'; one of: data, pretrain-tokenizer, convert-init," in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_a_shell_script(tmp_path: Path) -> None:
    script = run(tmp_path, "--dry-run", "--only", "rlhf ppo", "--only", "convert-init", DOCKER_HOST="nonsense").stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = [line for line in script.splitlines() if line.startswith("docker run ")]
    assert [re.findall(r" (?:convert|rlhf):latest (?:init|ppo) ", line) for line in lines] == [
        [" convert:latest init "],
        [" rlhf:latest ppo "],
    ]
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(["flock", tmp_path / "demo.lock", "sh", "-c", "echo held; exec sleep 60"], stdout=-1)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert "another demo is at work" in complaint(run(tmp_path, code=2))
    finally:
        holder.kill()


# What does.


@pytest.fixture(scope="module")
def place(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A work directory in which the first stages ran, and what the pipeline said."""
    work = tmp_path_factory.mktemp("work")
    said = run(work, "--until", FIRST[-1]).stdout
    (work / "said.txt").write_text(said, encoding="utf-8")
    yield work
    assert left(work) == []


def test_the_first_stages_run(place: Path) -> None:
    said = (place / "said.txt").read_text(encoding="utf-8")
    for number, name in enumerate(FIRST, start=1):
        assert f"=== {name} ({number} of {len(FIRST)})\n$ docker run --rm " in said
        assert f"\n{name} | " in said
        assert re.search(rf"^=== {re.escape(name)}: .+ \(\d+ s\)$", said, re.MULTILINE)
    for name, tool in [("tokenizer", "pretrain"), ("init", "convert"), ("init-mg", "convert")]:
        made = json.loads((place / name / "manifest.json").read_text())
        assert made["tool"] == tool
        assert made["image"] == f"{tool}:{made['version']}"
        assert (place / name / "manifest.json").stat().st_uid == os.getuid()
    assert left(place) == []


def test_finished_stages_are_skipped(place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("manifest.json")}
    said = run(place, "--until", FIRST[-1]).stdout
    assert said.count("already done") == len(FIRST)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("manifest.json")} == before


def test_the_printed_line_is_the_container(place: Path) -> None:
    """Created by the line, a container is configured as the one that the docker package creates."""
    line = re.findall(r"^\$ (docker run .*)$", (place / "said.txt").read_text(), re.MULTILINE)[2]
    typed = line.replace("docker run --rm", "docker create", 1)
    ours = (
        "import sys, docker; sys.path.insert(0, 'containers'); from jobs import *; from pathlib import Path\n"
        f"job = jobs(Path({str(place)!r}))[2]\n"
        "print(docker.from_env().containers.create(**keywords(job)).id)"
    )
    made = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (shlex.split(typed), [PYTHON, "-c", ours])
    ]
    try:
        shown = subprocess.run(["docker", "inspect", *made], capture_output=True, text=True, check=True).stdout
        typed_config, our_config = ({**one["HostConfig"], **one["Config"]} for one in json.loads(shown))
    finally:
        subprocess.run(["docker", "rm", *made], capture_output=True, check=True)
    what = ["Image", "Cmd", "Entrypoint", "User", "WorkingDir", "Env", "Binds", "NetworkMode", "CapDrop", "SecurityOpt"]
    what += ["ReadonlyRootfs", "Tmpfs", "ShmSize", "Init", "Privileged", "PidMode", "IpcMode", "Ulimits", "CapAdd"]
    assert {name: typed_config.get(name) or None for name in what} == {
        name: our_config.get(name) or None for name in what
    }
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False).returncode == 0


def test_a_failing_stage_hands_on_its_code_and_its_last_line(place: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "convert init", code=2)
    assert complaint(done) == (
        "pipeline: `convert init` ended with exit code 2: convert init: error: "
        "--tokenizer /data/tokenizer: does not exist"
    )
    assert "convert init | convert init: error: --tokenizer" in done.stdout
    assert left(tmp_path) == []


def test_missing_images_are_named_with_the_target_that_makes_them(place: Path) -> None:
    done = run(place, "--until", "convert to-megatron", code=2, CONVERT_VERSION="0.0.1.nowhere", PRETRAIN_VERSION="0.0")
    assert complaint(done) == (
        "pipeline: missing images: convert:0.0.1.nowhere pretrain:0.0; "
        "build them with: make image-convert image-pretrain"
    )


def started(work: Path, *more: str, line: str) -> subprocess.Popen[str]:
    """A pipeline whose stage has said the line."""
    process = subprocess.Popen(words(work, *more), cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    for said in process.stdout:
        if line in said:
            return process
    raise AssertionError(f"ended with {process.wait()} before {line!r}: {process.communicate()[1]}")


@pytest.fixture
def work(place: Path, tmp_path: Path) -> Iterator[Path]:
    """A work directory with the data, in which the tokenizer is still to be made."""
    shutil.copytree(place / "data", tmp_path / "data")
    yield tmp_path
    assert left(tmp_path) == []


def tokenizing(work: Path) -> subprocess.Popen[str]:
    """A pipeline with the tokenizer's container."""
    process = started(work, "--only", "pretrain tokenizer", line="=== pretrain tokenizer (")
    while not left(work):
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT], ids=lambda told: told.name)
def test_a_signal_stops_the_stage_and_the_same_command_goes_on(work: Path, told: signal.Signals) -> None:
    process = tokenizing(work)
    time.sleep(random.uniform(0, 1))  # the stage takes two seconds at least
    process.send_signal(told)
    began = time.monotonic()
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 75, errors
    assert time.monotonic() - began < 60  # it went when it was told to: nobody had to kill it
    assert errors == "pipeline: stopped in `pretrain tokenizer`; run the same command again to resume\n"
    assert left(work) == []
    assert not (work / "tokenizer").exists()
    run(work, "--only", "pretrain tokenizer")
    assert (work / "tokenizer" / "manifest.json").exists()


DEAF = """
import dataclasses, pathlib, sys
sys.path.insert(0, "containers")
import jobs, pipeline
work = pathlib.Path(sys.argv[1])
words = ("-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)")
sys.exit(pipeline.run_all([dataclasses.replace(jobs.jobs(work)[0], words=words)], work))
"""


def test_a_second_signal_does_not_wait_for_a_stage_that_does_not_go(place: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([PYTHON, "-c", DEAF, tmp_path], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    while process.stdout.readline() != "data | deaf\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, left(tmp_path)) == (75, []), errors


def test_the_stage_of_a_killed_pipeline_is_stopped_by_the_next(work: Path) -> None:
    process = tokenizing(work)
    process.kill()
    process.communicate()
    assert len(left(work)) == 1
    said = run(work, "--only", "pretrain tokenizer").stdout
    assert "which an earlier pipeline left" in said
    assert (work / "tokenizer" / "manifest.json").exists()


def test_training_that_is_stopped_saves(place: Path) -> None:
    run(place, "--only", "pretrain prepare")
    process = started(place, "--only", "pretrain train", line="pretrain train | validation after update 0")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 75, errors
    saved = json.loads((place / "pretrained-mg" / "manifest.json").read_text())
    assert saved["state"] == "running"
    assert 0 < saved["iteration"] < 100  # saved when it was told to go: --save-every is 100


def test_gpus_are_asked_of_the_engine(place: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU: the engine does not refuse")
    line = complaint(run(place, "--gpus", "--only", "pretrain train", code=1))
    assert "could not select device driver" in line
    assert "gpu" in line
