"""compose.yaml for real: the demo's first stages as services, by a user who is not root."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["data", "pretrain-tokenizer", "convert-init", "convert-to-megatron"]
USER = "12345" if os.getuid() == 0 else str(os.getuid())
GROUP = "12346" if os.getuid() == 0 else str(os.getgid())


class Project:
    """Services on a work directory of their own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.name = f"baton-test-{uuid.uuid4().hex[:8]}"
        if os.getuid() == 0:
            os.chown(work, int(USER), int(GROUP))

    def __call__(self, *words: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["docker", "compose", "--ansi", "never", "--project-name", self.name, *words]
        mine = {"DATA": str(data or self.work), "UID": USER, "GID": GROUP}
        return subprocess.run(command, cwd=ROOT, env=os.environ | mine, capture_output=True, text=True, check=False)


@pytest.fixture
def project(images: None, tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path)
    yield project
    project("down", "--timeout", "0")


def test_the_first_stages_run_one_after_the_other_and_are_skipped_the_second_time(project: Project) -> None:
    done = project("up", "--attach-dependencies", FIRST[-1])
    assert done.returncode == 0, done.stderr
    times = []
    for name in FIRST:
        container = json.loads(subprocess.check_output(["docker", "inspect", f"{project.name}-{name}-1"]))[0]
        assert container["State"]["ExitCode"] == 0
        times += [container["State"]["StartedAt"], container["State"]["FinishedAt"]]
    assert times == sorted(times)
    manifests = {path: json.loads(path.read_text()) for path in sorted(project.work.glob("*/manifest.json"))}
    assert [(path.parent.name, made["tool"]) for path, made in manifests.items()] == [
        ("init", "convert"),
        ("init-mg", "convert"),
        ("tokenizer", "pretrain"),
    ]
    assert all(made["image"] == f"{made['tool']}:{made['version']}" for made in manifests.values())
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in project.work.rglob("*")}
    assert owners == {(int(USER), int(GROUP))}

    again = project("up", "--attach-dependencies", FIRST[-1])
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count("already done") == len(FIRST)
    assert {path: json.loads(path.read_text()) for path in manifests} == manifests


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
