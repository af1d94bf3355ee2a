"""Slurm command lines of the scripts, recorded by fake Slurm programs: needs no cluster and no pyxis."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import shown_lines

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "containers" / "slurm"

Stage = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]

SRUN = """#!/bin/sh
printf '%s\\0' "$@" >>"$RECORD"
env >"$RECORD.env"
exit "${SRUN_EXIT:-0}"
"""
SCONTROL = """#!/bin/sh
case "$*" in
"show hostnames "*) printf 'n1\\nn2\\n' ;;
"--oneliner show node n1") echo "NodeName=n1 Arch=x NodeAddr=10.0.0.7 NodeHostName=n1 Version=22" ;;
"requeue "*) echo "$*" >>"$RECORD.scontrol" ;;
*) exit 9 ;;
esac
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Run stage.sbatch as slurmd would; gives what came of it and the words for srun."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "convert": "", "pretrain": "", "rlhf": ""}.items():
        (programs / name).write_text(text or "#!/bin/sh\n")
        (programs / name).chmod(0o755)

    def run(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        base = {"PATH": f"{programs}:/usr/bin:/bin", "RECORD": str(record)}
        job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
        done = subprocess.run(
            ["bash", SLURM / "stage.sbatch", *words],
            env=base | job | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, record.read_text().split("\0")[:-1] if record.exists() else []

    return run


WORDS = ("convert", "to-hf", "--source", "a b", "--target", "c")
PLAIN = ["--ntasks=1", "--wait=600", "--kill-on-bad-exit=0"]
RANKS = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}
TRAIN = ("pretrain", "train", "--source", "mg")


def test_one_task_is_the_command_itself(stage: Stage, tmp_path: Path) -> None:
    done, srun = stage(*WORDS, RANK="3", WORLD_SIZE="4")
    assert (done.returncode, done.stderr) == (0, "")
    assert srun == [*PLAIN, *WORDS]
    names = {line.partition("=")[0] for line in (tmp_path / "record.env").read_text().splitlines()}
    assert not names & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}


def test_cpus_are_handed_on(stage: Stage) -> None:
    assert stage(*WORDS, SLURM_CPUS_PER_TASK="8")[1] == [*PLAIN, "--cpus-per-task=8", *WORDS]


def test_pyxis_gets_the_image_the_mounts_and_no_entrypoint(stage: Stage, tmp_path: Path) -> None:
    form = ["--no-container-mount-home", "--no-container-entrypoint"]
    _, srun = stage(*WORDS, IMAGE="/images/{tool}-0.1.0.sqsh", MOUNTS="/data:/data,/models:/models:ro")
    images = ["--container-image=/images/convert-0.1.0.sqsh", "--container-mounts=/data:/data,/models:/models:ro"]
    assert srun == [*PLAIN, *images, f"--container-workdir={tmp_path}", *form, *WORDS]
    _, srun = stage("not-on-path", "x", IMAGE="registry.example#convert:0.1.0")
    images = ["--container-image=registry.example#convert:0.1.0", f"--container-mounts={tmp_path}:{tmp_path}"]
    assert srun == [*PLAIN, *images, f"--container-workdir={tmp_path}", *form, "not-on-path", "x"]


def test_many_tasks_are_ranks_in_a_container_too(stage: Stage, tmp_path: Path) -> None:
    done, srun = stage(*TRAIN, **RANKS, SLURM_CPUS_PER_TASK="6", IMAGE="{tool}")
    assert done.returncode == 0, done.stderr
    assert srun[0] == "--ntasks=16"
    assert "--container-image=pretrain" in srun
    at = srun.index("sh")
    assert srun[at - 1] == "--label"
    given = dict(line.split("=", 1) for line in (tmp_path / "record.env").read_text().splitlines() if "=" in line)
    wanted = {"WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "21234", "OMP_NUM_THREADS": "6"}
    assert {name: given[name] for name in wanted} == wanted
    for gpus, local in (("0,1,2,3", "5"), ("5", "0"), ("", "5")):
        task = {"SLURM_PROCID": "13", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": gpus}
        show = 'echo "$RANK $LOCAL_RANK $0 $*"'
        words = [*srun[at : at + 4], "sh", "-c", show, *srun[at + 4 :]]
        said = subprocess.run(words, env=os.environ | task, capture_output=True, text=True, check=True).stdout
        assert said == f"13 {local} {' '.join(TRAIN)}\n"


def test_a_node_list_of_tasks_per_node_alone_counts(stage: Stage) -> None:
    _, srun = stage(*TRAIN, SLURM_JOB_NUM_NODES="2", SLURM_NTASKS_PER_NODE="4", SLURM_GPUS_ON_NODE="4")
    assert srun[0] == "--ntasks=8"


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        ((), {}, "no command"),
        (("nothing-of-that-name", "x"), {}, "nothing-of-that-name is not on PATH"),
        (WORDS, RANKS, "convert to-hf is one process, and the job has 16 tasks"),
        (("pretrain", "prepare"), RANKS, "pretrain prepare is one process"),
        (TRAIN, RANKS | {"SLURM_GPUS_ON_NODE": "4"}, "--ntasks-per-node=8 and 4 GPUs a node"),
        (TRAIN, {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=1 and 8 GPUs a node"),
        (WORDS, {"LIST": "/dev/null"}, "LIST is for array jobs"),
        (WORDS, {"LIST": "/dev/null", "SLURM_ARRAY_TASK_ID": "1"}, "/dev/null has no line 1"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    stage: Stage, words: tuple[str, ...], variables: dict[str, str], error: str
) -> None:
    done, srun = stage(*words, **variables)
    assert (done.returncode, srun) == (2, [])
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_array_task_takes_its_line(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("one\ntwo & a half\nthree\n")
    _, srun = stage(
        "convert", "{}", "--target=x/{}/y{}", LIST="list", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="3"
    )
    assert srun == [*PLAIN, "convert", "two & a half", "--target=x/two & a half/ytwo & a half"]


def test_an_array_task_takes_its_number(stage: Stage) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    _, srun = stage("convert", "--shard", "{task}/{tasks}", "--target", "a b-{task}", **array)
    assert srun == [*PLAIN, "convert", "--shard", "3/4", "--target", "a b-3"]
    _, srun = stage("convert", "--shard", "{task}/{tasks}")
    assert srun == [*PLAIN, "convert", "--shard", "{task}/{tasks}"]


@pytest.mark.parametrize(
    ("exit_code", "variables", "requeued"),
    [
        ("75", {}, True),
        ("75", {"SLURM_RESTART_COUNT": "99"}, True),
        ("75", {"SLURM_RESTART_COUNT": "100"}, False),
        ("75", {"SLURM_RESTART_COUNT": "1", "MAX_REQUEUES": "1"}, False),
        ("1", {}, False),
        ("0", {}, False),
        ("137", {}, False),
    ],
)
def test_only_what_was_interrupted_goes_back_to_the_queue(
    stage: Stage, tmp_path: Path, exit_code: str, variables: dict[str, str], requeued: bool
) -> None:
    done, _ = stage(*WORDS, SRUN_EXIT=exit_code, **variables)
    assert done.returncode == int(exit_code)
    told = tmp_path / "record.scontrol"
    assert (told.read_text() if told.exists() else "") == ("requeue 41234\n" if requeued else "")


def test_the_tools_accept_what_the_readme_submits(tmp_path: Path) -> None:
    submitted = [line.partition("stage.sbatch ")[2].strip(" )") for line in shown_lines("stage.sbatch ")]
    shown = [words for words in submitted if not words.startswith("docker ")]
    (tmp_path / "file.jsonl").write_text("{}\n")
    assert {words.split()[0] for words in shown} == {"convert", "pretrain", "rlhf", "infer"}
    assert {"infer rollouts", "rlhf grpo"} <= {" ".join(words.split()[:2]) for words in shown}
    for words in shown:
        python = ROOT / "tools" / words.split()[0] / ".venv" / "bin" / "python"
        parsed = [python, ROOT / "tests" / "readme_commands.py", words.split()[0], tmp_path]
        answer = subprocess.run(parsed, input=words, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)[0][0] == 0, f"{words}\n{answer.stdout}"


def test_no_site_is_written_down() -> None:
    for path in SLURM.iterdir():
        options = re.findall(r"^#SBATCH (--[a-z-]+)", path.read_text(), re.MULTILINE)
        assert path.name != "stage.sbatch" or options == ["--requeue", "--open-mode", "--signal"]
