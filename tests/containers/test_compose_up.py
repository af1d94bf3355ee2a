"""compose.yaml with a Docker engine: the demo's first stages as services, as a non-root user."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["data", "pretrain-tokenizer", "convert-init", "convert-to-megatron"]
USER = "12345" if os.getuid() == 0 else str(os.getuid())
GROUP = "12346" if os.getuid() == 0 else str(os.getgid())


def inspect(container: str) -> dict[str, Any]:
    """What the engine says of it."""
    return dict(json.loads(subprocess.check_output(["docker", "inspect", container]))[0])


class Project:
    """Services on a work directory of their own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.name = f"baton-test-{uuid.uuid4().hex[:8]}"
        if os.getuid() == 0:
            os.chown(work, int(USER), int(GROUP))

    def __call__(self, *words: str, data: Path | None = None, port: int = 0) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "--ansi", "never", "--project-name", self.name, *words]
        mine = {"DATA": str(data or self.work), "UID": USER, "GID": GROUP, "PORT": str(port)}
        return subprocess.run(command, cwd=ROOT, env=os.environ | mine, capture_output=True, text=True, check=False)


@pytest.fixture
def project(images: None, tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path)
    yield project
    project("down", "--timeout", "0")


@pytest.fixture(scope="module")
def road(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose first stages ran."""
    project = Project(tmp_path_factory.mktemp("road"))
    done = project("up", "--attach-dependencies", FIRST[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    yield project
    project("down", "--timeout", "0")


def manifests(work: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in work.glob("*/manifest.json")}


def test_the_first_stages_run_one_after_the_other(road: Project) -> None:
    times = []
    for name in FIRST:
        state = inspect(f"{road.name}-{name}-1")["State"]
        assert state["ExitCode"] == 0
        times += [state["StartedAt"], state["FinishedAt"]]
    assert times == sorted(times)
    made = manifests(road.work)
    assert {name: one["tool"] for name, one in made.items()} == {
        "tokenizer": "pretrain",
        "init": "convert",
        "init-mg": "convert",
    }
    assert all(one["image"] == f"{one['tool']}:{one['version']}" for one in made.values())


def test_every_file_is_the_callers(road: Project) -> None:
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in road.work.rglob("*")}
    assert owners == {(int(USER), int(GROUP))}


def test_finished_stages_are_skipped(road: Project) -> None:
    before = manifests(road.work)
    again = road("up", "--attach-dependencies", FIRST[-1])
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count("already done") == len(FIRST)
    assert manifests(road.work) == before


def test_the_server_is_healthy_answers_this_machine_alone_and_ends_with_0(road: Project) -> None:
    if subprocess.run(["docker", "image", "inspect", "infer:latest"], capture_output=True, check=False).returncode:
        pytest.skip("infer:latest is not here: make image-infer")
    shutil.copytree(road.work / "init", road.work / "ppo")
    for path in (road.work / "ppo", *(road.work / "ppo").rglob("*")):
        os.chown(path, int(USER), int(GROUP))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    up = road("up", "--no-deps", "--wait", "--wait-timeout", "400", "serve", port=port)
    assert up.returncode == 0, up.stderr + road("logs", "serve").stdout
    container = inspect(f"{road.name}-serve-1")
    assert container["State"]["Health"]["Status"] == "healthy"
    assert container["NetworkSettings"]["Ports"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["ppo"]
    road("stop", "serve")
    assert inspect(f"{road.name}-serve-1")["State"]["ExitCode"] == 0


def test_nothing_runs_after_a_stage_that_failed(project: Project) -> None:
    (project.work / "data").mkdir()  # the stage takes it for done, and the next finds no text
    done = project("up", "--attach-dependencies", "convert-init")
    assert done.returncode != 0
    assert "pretrain tokenizer: error: --source" in done.stdout + done.stderr
    assert """service "pretrain-tokenizer" didn't complete successfully: exit 2""" in done.stderr
    assert not (project.work / "init").exists()


def test_a_work_directory_that_is_not_there_is_not_made_by_root(project: Project) -> None:
    done = project("up", "data", data=project.work / "absent")
    assert done.returncode != 0
    assert "bind source path does not exist" in done.stderr
    assert not (project.work / "absent").exists()
