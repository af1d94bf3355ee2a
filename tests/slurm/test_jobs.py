"""stage.sbatch on a cluster: exit codes, requeues, arrays, refusals. Short commands stand in for long ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import shown_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "containers" / "slurm" / "stage.sbatch"

# Ready when the marker is there; then it takes a moment over saving, as a tool does.
STOPPABLE = 'trap "sleep 1; echo saved; exit 75" {} ; touch ready-$SLURM_JOB_ID; while :; do sleep 0.1; done'


@pytest.fixture(scope="module", autouse=True)
def time_limited(cluster: Any) -> str:
    """A job near its time limit, begun before the others: Slurm looks at time limits twice a minute."""
    again = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo went on; exit 0; };'
    job: str = cluster.submit("--time=1 --signal=USR1@55", "sh", "-c", f"{again} {STOPPABLE.format('USR1')}")
    return job


def test_a_stage_of_one_process(cluster: Any, inputs: Path) -> None:
    job = cluster.submit("", "convert", "to-megatron", "--source", inputs / "hf", "--target", "one")
    (record,) = cluster.wait(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("COMPLETED", "0:0", "0"), cluster.log(job)
    assert json.loads((cluster.place / "one" / "manifest.json").read_text())["kind"] == "megatron"


def test_a_mistake_keeps_its_exit_code_and_its_line(cluster: Any) -> None:
    job = cluster.submit("", "convert", "to-megatron", "--source", "missing", "--target", "x")
    (record,) = cluster.wait(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "2:0", "0")
    assert "convert to-megatron: error: --source missing: does not exist" in cluster.log(job)


def test_a_job_that_is_always_interrupted_comes_to_an_end(cluster: Any) -> None:
    job = cluster.submit("", "sh", "-c", "exit 75", MAX_REQUEUES="1")
    (record,) = cluster.wait(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "75:0", "1")
    assert "requeued 1 times already" in cluster.log(job)


def test_what_is_cancelled_stays_cancelled(cluster: Any) -> None:
    job = cluster.submit("", "sh", "-c", STOPPABLE.format("TERM"))
    cluster.until((cluster.place / f"ready-{job}").exists)
    cluster.run("scancel", job)
    (record,) = cluster.wait(job, seconds=60)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    cluster.until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job, code=None).stdout)


def test_an_array_converts_a_checkpoint_a_task(cluster: Any, inputs: Path) -> None:
    names = ["hf", "hf2", "missing"]
    (cluster.place / "list").write_text("".join(f"{name}\n" for name in names))
    job = cluster.submit(
        *("--array=1-3", "convert", "to-megatron", "--source", inputs / "{}", "--target", "array-{}"), LIST="list"
    )
    records = sorted(cluster.wait(job), key=lambda record: int(record["ArrayTaskId"]))
    assert [record["ExitCode"] for record in records] == ["0:0", "0:0", "2:0"]
    fingerprints = {
        json.loads((cluster.place / f"array-{name}" / "manifest.json").read_text())["parents"][0]["fingerprint"]
        for name in names[:2]
    }
    assert len(fingerprints) == 2
    assert not (cluster.place / "array-missing").exists()


def test_an_array_converts_one_checkpoint_in_parts(cluster: Any, inputs: Path) -> None:
    words = ("convert", "to-megatron", "--source", inputs / "hf", "--target", "parts", "--shard")
    parts = cluster.submit("--array=1-3", *words, "{task}/{tasks}")
    publish = cluster.submit(f"--dependency=afterok:{parts}", *words, "publish/3")
    records = cluster.wait(parts, publish)
    assert [record["ExitCode"] for record in records] == ["0:0"] * 4, cluster.logs()
    whole = cluster.submit("", *words[:-2], "whole")
    assert cluster.wait(whole)[0]["ExitCode"] == "0:0", cluster.logs()
    hashes = [json.loads((cluster.place / name / "manifest.json").read_text())["files"] for name in ("parts", "whole")]
    assert hashes[0] == hashes[1]
    assert not list(cluster.place.glob("parts.*"))


@pytest.mark.parametrize(
    "options", ["--nodes=3", "--gpus-per-node=9", "--nodes=1 --ntasks=65", "--partition=nowhere", "--constraint=h100"]
)
def test_resources_that_are_not_there_are_refused(cluster: Any, options: str) -> None:
    refused = cluster.run("sbatch", *shlex.split(options), SCRIPT, "true", code=1)
    assert "Batch job submission failed" in refused.stderr or "Invalid" in refused.stderr


@pytest.mark.parametrize(
    ("options", "command", "error"),
    [
        ("--nodes=2", ("convert", "families"), "convert families is one process, and the job has 2 tasks"),
        ("--ntasks-per-node=2 --gpus-per-node=4", ("sft", "train"), "--ntasks-per-node=2 and 4 GPUs a node"),
    ],
)
def test_resources_that_do_not_fit_the_stage_are_named(
    cluster: Any, options: str, command: tuple[str, ...], error: str
) -> None:
    job = cluster.submit(options, *command)
    (record,) = cluster.wait(job)
    assert record["ExitCode"] == "2:0"
    assert error in cluster.log(job)


def test_a_job_may_run_a_container(cluster: Any, inputs: Path) -> None:
    try:
        found = subprocess.run(
            ["docker", "image", "inspect", "convert:latest"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no docker here")
    if found.returncode:
        pytest.skip(f"no image convert:latest for a job to run: {found.stderr.strip().splitlines()[-1]}")
    place = cluster.place / "docker"
    place.mkdir()
    user = ("--user", f"{os.getuid()}:{os.getgid()}")
    mounts = ("--volume", f"{inputs}:/in:ro", "--volume", f"{place}:/data", "--network", "none", "--read-only")
    words = ("--tmpfs", "/tmp", "convert:latest", "to-megatron", "--source", "/in/hf", "--target", "/data/mg")
    job = cluster.submit("", "docker", "run", "--rm", *user, *mounts, *words)
    (record,) = cluster.wait(job)
    assert record["JobState"] == "COMPLETED", cluster.log(job)
    assert (place / "mg" / "manifest.json").is_file()
    (record,) = cluster.wait(cluster.submit("", "docker", "run", "--rm", "convert:latest", "inspect", "/missing"))
    assert record["ExitCode"] == "2:0"


@pytest.mark.parametrize("line", shown_lines("stage.sbatch"))
def test_the_cluster_would_run_what_the_readme_says(cluster: Any, line: str) -> None:
    """Slurm itself looks at the options; nothing is started."""
    line = re.sub(r"\bsbatch\b(?= )", "sbatch --test-only", line, count=1).replace(" --wait", "")
    before = "PARTS=$(sbatch --parsable --output=/dev/null --wrap=true) && " if "$PARTS" in line else ""
    answer = cluster.run("bash", "-c", f"cd {ROOT} && {before}{line}")
    assert "to start at" in answer.stderr


def test_the_time_limit_saves_and_requeues(cluster: Any, time_limited: str) -> None:
    (record,) = cluster.wait(time_limited)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), cluster.log(time_limited)
    assert re.search(r"saved\n.*goes back to the queue\n.*went on\n$", cluster.log(time_limited), re.DOTALL)
