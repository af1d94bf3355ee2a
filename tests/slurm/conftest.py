"""A two-node Slurm cluster on this machine, with the tools on its PATH and a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "containers" / "slurm"
NO_CLUSTER = 3  # exit code of cluster.sh where there can be none
TOOLS = ("convert", "pretrain", "sft", "rlhf", "infer")
READMES = (SLURM / "README.md", ROOT / "tools" / "rlhf" / "README.md")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

STUBBORN = "sleep 86399"

CONFIG = {  # heads of 32, the smallest for which vLLM has attention on the CPU
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def shown_lines(word: str) -> list[str]:
    """The READMEs' commands that hold a word, each on one line."""
    texts = "".join(readme.read_text() for readme in READMES)
    blocks = re.findall(r"^```bash\n(.*?)^```", texts, re.DOTALL | re.MULTILINE)
    return [line for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if word in line]


def environment() -> dict[str, str]:
    """What a user's shell has where jobs are submitted."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    path = ":".join([*(str(ROOT / "tools" / tool / ".venv" / "bin") for tool in TOOLS), os.environ["PATH"]])
    # The nodes are this machine, whose own name need not resolve.
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Slurm's commands, and the working directory jobs are submitted from."""

    env: dict[str, str]
    place: Path

    def run(self, *words: object, code: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """One command; its exit code must be `code`."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.env | variables,
            cwd=self.place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, options: str, *command: object, **variables: str) -> str:
        """A job of stage.sbatch; its id."""
        options_ = ["--parsable", "--output=%j.log", *shlex.split(options)]
        return self.run("sbatch", *options_, SLURM / "stage.sbatch", *command, **variables).stdout.strip()

    def show(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job, or of every task of an array."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line]

    def wait(self, *jobs: str, seconds: float = 300) -> list[dict[str, str]]:
        """The jobs' last words, once all have ended."""
        deadline = time.monotonic() + seconds
        while True:
            shown = [record for job in jobs for record in self.show(job)]
            if all(record["JobState"] in ENDED for record in shown):
                return shown
            assert time.monotonic() < deadline, f"{shown}\n{self.logs()}"
            time.sleep(0.2)

    def until(self, true: Callable[[], bool], seconds: float = 200) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{self.run('squeue').stdout}\n{self.logs()}"
            time.sleep(0.05)

    def log(self, job: str) -> str:
        """What a job printed."""
        return (self.place / f"{job}.log").read_text()

    def logs(self) -> str:
        """What all of them printed."""
        return "".join(f"== {path.name}\n{path.read_text()[-3000:]}\n" for path in sorted(self.place.rglob("*.log")))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without jobs; its daemons are gone afterwards."""
    script = str(SLURM / "cluster.sh")
    subprocess.run([script, "stop"], check=True, capture_output=True)
    try:
        started = subprocess.run([script, "start"], capture_output=True, text=True, check=False)
        if started.returncode == NO_CLUSTER:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        name, _, value = started.stdout.strip().splitlines()[-1].removeprefix("export ").partition("=")
        cluster = Cluster(env=environment() | {name: value}, place=tmp_path_factory.mktemp("jobs"))
        yield cluster
        cluster.submit("", "sh", "-c", f"trap '' TERM USR1; touch stubborn; while :; do {STUBBORN}; done")
        cluster.until((cluster.place / "stubborn").exists)
    finally:
        subprocess.run([script, "stop"], check=True, capture_output=True)
    assert not left_running()


def left_running() -> list[str]:
    """Processes of the cluster and of its last job, which ignores every signal that can be ignored."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if STUBBORN in line or "baton-slurm" in line or re.match("slurmd -N n[12]", line)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `hf` and another in `hf2`; text, conversations, preferences and prompts."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "text").mkdir()
    words = ["red", "green", "blue", "seven", "eight", "nine"]
    chance = random.Random(0)
    (place / "text" / "one.txt").write_text("\n".join(" ".join(chance.choices(words, k=30)) for _ in range(300)))

    def rows(name: str, make: Callable[[str, str], object]) -> None:
        pairs = [(words[i % 6], words[(i + 1) % 6]) for i in range(48)]
        (place / name).write_text("".join(json.dumps(make(*pair)) + "\n" for pair in pairs))

    def asked(word: str) -> dict[str, str]:
        return {"role": "user", "content": f"after {word}?"}

    rows("chats.jsonl", lambda a, b: {"messages": [asked(a), {"role": "assistant", "content": b}]})
    rows("preferences.jsonl", lambda a, b: {"prompt": f"after {a}?", "chosen": b, "rejected": a + a})
    rows("prompts.jsonl", lambda a, b: {"messages": [asked(a)]})
    (place / "config.json").write_text(json.dumps(CONFIG))

    def tool(*command: object) -> None:
        subprocess.run([str(w) for w in command], env=environment(), cwd=place, check=True, capture_output=True)

    tool("pretrain", "tokenizer", "--source", "text", "--target", "tokenizer", "--vocab-size", 512)
    for seed, name in enumerate(("hf", "hf2")):
        init = ("--model-config", "config.json", "--tokenizer", "tokenizer", "--dtype", "fp32", "--seed", seed)
        tool("convert", "init", *init, "--target", name)
    return place


def manifest(directory: Path) -> dict[str, Any]:
    """A published directory's own account."""
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return content


@pytest.fixture(scope="session")
def curve() -> Callable[[Path], list[tuple[int, float]]]:
    """The loss of every update of a run, to the last bit."""

    def read(run: Path) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    return read
