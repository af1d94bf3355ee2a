"""Multi-node training runs, preempted and resumed; the pipeline as a chain of jobs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "containers" / "slurm" / "pipeline.sh"
STEPS = 60  # of about 0.1 s: time enough to come in between
TRAIN = "--global-batch-size 32 --micro-batch-size 4 --precision fp32 --learning-rate 3e-3"
PRETRAIN = f"{TRAIN} --steps {STEPS} --save-every 100 --log-every 10"
STAGES = ["to-megatron", "verify", "corpus", "pretrain", "chats", "sft", "to-hf", "reward", "ppo", "generate"]
FEW = "--global-batch-size 8 --micro-batch-size 8"
ROAD = {
    "ON_TRAIN": "--nodes=2 --ntasks-per-node=1",
    "PRETRAIN_FLAGS": PRETRAIN,
    "SFT_FLAGS": f"{TRAIN} --steps 2",
    "REWARD_FLAGS": FEW,
    "PPO_FLAGS": f"{FEW} --steps 1 --rollout-batch-size 8 --max-new-tokens 8",
    "GENERATE_FLAGS": "--max-tokens 8",
}

Curve = Callable[[Path], list[tuple[int, float]]]


def submit_road(cluster: Any, inputs: Path, **variables: str) -> dict[str, str]:
    """Submit the chain; its jobs by stage."""
    lines = cluster.run(PIPELINE, inputs / "hf", inputs, "road", **{**ROAD, **variables}).stdout.splitlines()
    jobs = {name: job for job, name in (line.split() for line in lines)}
    assert list(jobs) == STAGES
    return jobs


def states(cluster: Any, jobs: dict[str, str]) -> dict[str, str]:
    return {name: record["JobState"] for name, record in zip(jobs, cluster.wait(*jobs.values()), strict=True)}


@pytest.fixture(scope="module")
def stopped(cluster: Any, inputs: Path) -> dict[str, str]:
    """The chain with a mistake in its middle."""
    return submit_road(cluster, inputs, SFT_FLAGS="--steps -1")


@pytest.fixture(scope="module")
def road(cluster: Any, stopped: dict[str, str]) -> Path:
    """The working directory of the chain, with all that comes before the mistake."""
    cluster.wait(*stopped.values())
    return cluster.place / "road"


def test_a_failed_stage_stops_the_chain(cluster: Any, stopped: dict[str, str], road: Path) -> None:
    found = states(cluster, stopped)
    at = STAGES.index("sft")
    assert [found[name] for name in STAGES] == ["COMPLETED"] * at + ["FAILED"] + ["CANCELLED"] * (len(STAGES) - at - 1)
    assert "sft train: error: --steps -1" in (road / "logs" / f"sft-{stopped['sft']}.log").read_text()
    assert not (road / "sft").exists()


def test_two_nodes_give_the_curve_of_one(cluster: Any, road: Path, curve: Curve) -> None:
    """The same layout by Slurm over two nodes, and by the tool's own launcher on one: equal to the last bit."""
    words = ("--source", road / "to-megatron", "--data", road / "corpus", "--target", "one-node", *PRETRAIN.split())
    job = cluster.submit("--nodes=1", "pretrain", "train", *words, "--processes", 2)
    (record,) = cluster.wait(job)
    assert record["JobState"] == "COMPLETED", cluster.log(job)
    assert [step for step, _ in curve(road / "pretrain")] == list(range(1, STEPS + 1))
    assert curve(road / "pretrain") == curve(cluster.place / "one-node")


def test_a_preempted_run_goes_on_exactly(cluster: Any, road: Path, curve: Curve) -> None:
    """Told to save by USR1, as before a time limit; then preempted by a job of more urgency; then to its end."""
    words = ("--source", road / "to-megatron", "--data", road / "corpus", "--target", "preempted", *PRETRAIN.split())
    whole = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=64"  # what is more urgent has to preempt
    job = cluster.submit(whole, "pretrain", "train", *words)
    after = cluster.submit(f"--dependency=afterok:{job}", "echo", "after")
    run = cluster.place / "preempted"

    def updates() -> int:
        return len(curve(run)) if (run / "metrics.jsonl").exists() else 0

    def restarts() -> int:
        return int(cluster.show(job)[0]["Restarts"])

    cluster.until(lambda: updates() >= 2)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.until(lambda: restarts() == 1)
    first = json.loads((run / "manifest.json").read_text())["iteration"]
    assert 2 <= first < STEPS
    cluster.until(lambda: updates() >= first + 2)
    urgent = cluster.submit("--partition=urgent --nodes=1 --ntasks=1 --cpus-per-task=64", "echo", "urgent")
    cluster.until(lambda: restarts() == 2)
    second = json.loads((run / "manifest.json").read_text())["iteration"]
    assert first < second < STEPS
    (record, _, _) = cluster.wait(job, urgent, after)
    log = cluster.log(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), log
    assert log.count("goes back to the queue") == 2
    for step in (first, second):
        assert f"resuming after update {step} of {STEPS}" in log
    assert curve(run) == curve(road / "pretrain")
    assert cluster.show(after)[0]["StartTime"] >= record["EndTime"]


def test_the_chain_runs_in_order_and_repeats_nothing(cluster: Any, inputs: Path, road: Path) -> None:
    finished = (road / "pretrain" / "manifest.json").read_bytes()
    jobs = submit_road(cluster, inputs)
    records = dict(zip(jobs, cluster.wait(*jobs.values(), seconds=600), strict=True))
    assert {record["JobState"] for record in records.values()} == {"COMPLETED"}, cluster.logs()
    for name in ("to-megatron", "corpus", "pretrain", "chats"):
        assert "already done" in (road / "logs" / f"{name}-{jobs[name]}.log").read_text()
    assert (road / "pretrain" / "manifest.json").read_bytes() == finished
    reads = {
        "verify": ["to-megatron"],
        "pretrain": ["verify", "corpus"],
        "sft": ["pretrain", "chats"],
        "to-hf": ["sft"],
        "reward": ["to-hf"],
        "ppo": ["reward"],
        "generate": ["ppo"],
    }
    for name, earlier in reads.items():
        assert records[name]["StartTime"] >= max(records[other]["EndTime"] for other in earlier)
    replies = (road / "generate" / "generations.jsonl").read_text().splitlines()
    assert len(replies) == len((inputs / "prompts.jsonl").read_text().splitlines())


def test_a_chain_that_cannot_be_submitted_whole_is_not_begun(cluster: Any, inputs: Path) -> None:
    done = cluster.run(PIPELINE, inputs / "hf", inputs, "half", **{**ROAD, "ON_TRAIN": "--nodes=9"}, code=1)
    jobs = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(jobs) == 3
    assert {record["JobState"] for record in cluster.wait(*jobs)} == {"CANCELLED"}


def test_the_pipeline_asks_for_its_three_directories() -> None:
    done = subprocess.run([PIPELINE, "one"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: pipeline.sh MODEL DATA WORK\n")
    assert re.search(r"pipeline\.sh MODEL DATA WORK$", PIPELINE.read_text(), re.MULTILINE)
