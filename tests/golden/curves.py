"""Golden curves: metrics of tiny training runs, recorded as text in tests/golden/curves.

    python3 tests/golden/curves.py check [--work DIR]     run every curve and compare it with its file
    python3 tests/golden/curves.py record [--work DIR]    run every curve and write its file

Runs use the tools' commands and directories only. On the CPU model of the recording, values must be equal to the last digit;
on another, within a tolerance. A refactoring changes no digit. A commit that records new curves says why the values changed.
Standard library only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CURVES = Path(__file__).with_name("curves")
THREADS = 1  # of every matrix product: sums are added up in an order that depends on it

# Every command, in order. Paths are relative to the working directory; `inputs` writes what no command makes.
TRAIN = "--global-batch-size 8 --micro-batch-size 4 --learning-rate 3e-3 --log-every 1"
PRETRAIN = f"--data corpus --sequence-length 32 --steps 5 --precision fp32 --validate-every 0 {TRAIN}"
RLHF = "--global-batch-size 8 --micro-batch-size 4 --learning-rate 1e-3"
REWARD = "--prompts prompts.jsonl --reward 0.5*model:reward,py:reward.py:shortness --steps 3 --max-new-tokens 8"
LINES = f"""
pretrain tokenizer --source text.jsonl --target tokenizer --vocab-size 320
convert init --size tiny --tokenizer tokenizer --target llama
rlhf reward --source llama --data preferences.jsonl --target reward {RLHF}
convert to-megatron --source llama --target llama-mg
pretrain prepare --source text.jsonl --tokenizer tokenizer --target corpus --validation-fraction 0.1 --workers 1
pretrain train --source llama-mg --target dense {PRETRAIN}
rlhf ppo --source llama --target ppo {REWARD} {RLHF} --rollout-batch-size 16 --zero 1
rlhf grpo --source llama --target grpo {REWARD} {RLHF} --epochs 2 --kl-coefficient 0.05
convert init --size qwen3-moe-tiny --tokenizer tokenizer --target qwen3-moe
convert to-megatron --source qwen3-moe --target qwen3-moe-mg
pretrain train --source qwen3-moe-mg --target moe {PRETRAIN}
convert init --size deepseek-v3-tiny --tokenizer tokenizer --target deepseek-v3
convert to-megatron --source deepseek-v3 --target deepseek-v3-mg
pretrain train --source deepseek-v3-mg --target mla {PRETRAIN}
convert init --size qwen3-next-tiny --tokenizer tokenizer --target qwen3-next
convert to-megatron --source qwen3-next --target qwen3-next-mg
pretrain train --source qwen3-next-mg --target gated-delta-net {PRETRAIN}
sft prepare --source conversations.jsonl --tokenizer tokenizer --target conversations --sequence-length 96 --workers 1
sft train --source llama-mg --data conversations --target sft --steps 5 --precision bf16 {TRAIN}
"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run and the numbers of it that are kept. Its name is that of the run's directory."""

    title: str
    columns: tuple[str, ...]
    # On another kind of CPU, which adds up in another order. Without vector units (ATEN_CPU_CAPABILITY=default and the like
    # for MKL and oneDNN) the largest differences were 7e-6 of the value in float32 and 4e-4 in bfloat16, and 2e-7 where the
    # value is zero but for rounding. Ten times that; a routed expert or a sampled token that changes is far beyond.
    relative: float = 1e-4
    absolute: float = 2e-6


_PRETRAINED = ("loss", "gradient_norm", "validation_loss")
CURVES_KEPT = {
    "dense": Curve(title="pretraining, dense (Llama), float32", columns=_PRETRAINED),
    "moe": Curve(title="pretraining, MoE (Qwen3 MoE), float32", columns=_PRETRAINED),
    "mla": Curve(
        title="pretraining, MLA, MoE and MTP (DeepSeek V3), float32",
        columns=("loss", "mtp_loss", "gradient_norm", "validation_loss", "validation_mtp_loss"),
    ),
    "gated-delta-net": Curve(
        title="pretraining, gated delta net, MoE and MTP (Qwen3 Next), float32",
        columns=("loss", "mtp_loss", "gradient_norm", "validation_loss", "validation_mtp_loss"),
    ),
    "sft": Curve(
        title="supervised fine-tuning, packed conversations (Llama), bfloat16",
        columns=("loss", "gradient_norm", "targets"),
        relative=5e-3,
    ),
    "reward": Curve(
        title="reward model, pairs (Llama), float32", columns=("loss", "grad_norm", "mean_reward", "margin", "accuracy")
    ),
    "ppo": Curve(
        title="PPO on a reward model and a function (Llama), float32",
        columns=(
            *("reward", "kl_reply", "entropy", "policy_loss", "value_loss", "explained_variance", "gradient_norm"),
            "reply_tokens",
        ),
    ),
    "grpo": Curve(
        title="GRPO on a reward model and a function (Llama), float32",
        columns=("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "completions/mean_length"),
    ),
}


def inputs(work: Path) -> None:
    """Text, conversations, preferences, prompts and a reward function, the same every time."""
    words = ["red", "green", "blue", "seven", "eight", "nine"]
    chance = random.Random(0)

    def rows(name: str, content: list[dict[str, Any]]) -> None:
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")

    def asked(word: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"after {word}?"}]

    def reply(*said: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": " ".join(said)}]

    def some(most: int) -> list[str]:
        return chance.choices(words, k=chance.randint(1, most))

    pairs = [(words[i % 6], words[(i + 1) % 6]) for i in range(48)]
    rows("text.jsonl", [{"text": " ".join(chance.choices(words, k=30))} for _ in range(200)])
    rows("conversations.jsonl", [{"messages": asked(a) + reply(b, *some(12))} for a, b in pairs])
    rows(
        "preferences.jsonl",
        [{"prompt": asked(a), "chosen": reply(b), "rejected": reply(a, *some(3))} for a, b in pairs],
    )
    rows("prompts.jsonl", [{"messages": asked(a)} for a, _ in pairs])
    (work / "reward.py").write_text(
        "def shortness(prompts, completions, **columns):\n    return [1.0 / (1 + len(text)) for text in completions]\n",
        encoding="utf-8",
    )


def commands() -> dict[str, list[str]]:
    """Directory -> the words of the command that makes it, in order."""
    lines = [line.split() for line in LINES.strip().splitlines()]
    return {words[words.index("--target") + 1]: words for words in lines}


def sources(target: str) -> list[str]:
    """The directories that a command reads, of those that another command makes."""
    words = commands()[target]
    values = [value for flag, value in itertools.pairwise(words) if flag.startswith("--")]
    named = {name for value in values for name in re.split(r"[,:*]", value)}
    return [name for name in commands() if name in named and name != target]


def lineage(target: str) -> list[str]:
    """The command lines that lead to a directory, in order."""
    wanted, open_ = {target}, [target]
    while open_:
        new = set(sources(open_.pop())) - wanted
        wanted |= new
        open_ += new
    return [" ".join(words) for name, words in commands().items() if name in wanted]


def run(work: Path, jobs: int) -> None:
    """Every command, each once its sources are there, `jobs` at a time."""
    free = threading.Semaphore(jobs)
    done: dict[str, Future[None]] = {}
    # __pycache__ of the environments is written: without it every command compiles its libraries anew
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}

    def one(name: str, words: list[str]) -> None:
        for source in sources(name):
            done[source].result()
        tool, *rest = words
        with free:
            process = subprocess.run(
                [ROOT / "tools" / tool / ".venv" / "bin" / tool, *rest],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{process.stderr[-2000:]}")

    with ThreadPoolExecutor(len(commands())) as pool:
        for name, words in commands().items():
            done[name] = pool.submit(one, name, words)
    for future in done.values():
        future.result()


def table(work: Path, name: str) -> list[list[str]]:
    """The kept numbers of a run, a row for each step: `repr` of each, `-` where the step has none."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (work / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps.setdefault(row["step"], {}).update(row)
    columns = CURVES_KEPT[name].columns
    absent = [column for column in columns if not any(column in row for row in steps.values())]
    if absent:
        raise SystemExit(f"{name}: metrics.jsonl has no {', '.join(absent)}")
    rows = [[str(step), *(repr(row[c]) if c in row else "-" for c in columns)] for step, row in sorted(steps.items())]
    return [["step", *columns], *rows]


def versions(tool: str) -> str:
    """The libraries that decide a tool's arithmetic, as its environment has them."""
    names = ("accelerate", "deepspeed", "megatron-core", "torch", "transformers", "trl")
    place = next((ROOT / "tools" / tool / ".venv" / "lib").glob("python3*")) / "site-packages"
    found = {d.name.lower(): d.version for d in metadata.distributions(path=[str(place)])}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def cpu() -> str:
    """The kind of this CPU: what libraries choose their kernels and block sizes by."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    chosen = ("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
    present = set((info.get("flags") or info.get("Features") or "").split())
    kind = [f"{name} {info[name]}" for name in names if name in info]
    return f"{platform.machine()}, {', '.join(kind)}; {' '.join(f for f in chosen if f in present)}; {THREADS} thread"


def text(name: str, rows: list[list[str]]) -> str:
    """A curve's file: what it is, how it was made, where; then the numbers in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    tool = commands()[name][0]
    return "\n".join(
        [
            f"# {CURVES_KEPT[name].title}",
            *(f"# $ {line}" for line in lineage(name)),
            f"# versions: {versions(tool)}",
            f"# cpu: {cpu()}",
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
            "",
        ]
    )


def differences(name: str, recorded: str, found: str) -> Iterator[str]:
    """What differs between two files of a curve, a line each."""
    (old_head, old), (new_head, new) = _parsed(recorded), _parsed(found)
    exact = old_head["cpu"] == new_head["cpu"]
    for key in ("commands", "versions"):
        if old_head[key] != new_head[key]:
            yield f"{name}: {key} recorded: {old_head[key]}; now: {new_head[key]}"
    if [row[0] for row in old] != [row[0] for row in new] or old[0] != new[0]:
        yield f"{name}: the steps or columns are others: {' '.join(old[0])}, {len(old)} rows; now {' '.join(new[0])}, {len(new)}"
        return
    curve = CURVES_KEPT[name]
    for column, title in enumerate(old[0]):
        for before, now in zip(old[1:], new[1:], strict=True):
            if not _same(before[column], now[column], exact, curve):
                within = "to the digit" if exact else f"within {curve.relative:g} of the value, on another kind of CPU"
                yield f"{name}: {title} of step {before[0]} was {before[column]}, is {now[column]} (compared {within})"
                break  # what follows from the first is no news


def _same(before: str, now: str, exact: bool, curve: Curve) -> bool:
    if exact or "-" in (before, now):
        return before == now
    return math.isclose(float(before), float(now), rel_tol=curve.relative, abs_tol=curve.absolute)


def _parsed(content: str) -> tuple[dict[str, str], list[list[str]]]:
    head, rows = {"commands": ""}, []
    for line in content.splitlines():
        if line.startswith("# $ "):
            head["commands"] += line.removeprefix("# $ ") + "; "
        elif line.startswith("# "):
            key, _, value = line.removeprefix("# ").partition(": ")
            head[key] = value
        else:
            rows.append(line.split())
    return head, rows


def check(work: Path) -> list[str]:
    """What differs between the curves of `work` and those recorded."""
    found = []
    for name in CURVES_KEPT:
        path = CURVES / f"{name}.txt"
        found += differences(name, path.read_text(encoding="utf-8"), text(name, table(work, name)))
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "record"))
    parser.add_argument("--work", type=Path, help="an empty directory to run in, which is kept")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="commands at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        inputs(work)
        run(work, options.jobs)
        if options.action == "record":
            CURVES.mkdir(exist_ok=True)
            for name in CURVES_KEPT:
                (CURVES / f"{name}.txt").write_text(text(name, table(work, name)), encoding="utf-8")
            return 0
        found = check(work)
    for line in found:
        print(line)
    if found:
        print(
            "A change of these numbers must be explained. If it is meant: `python3 tests/golden/curves.py record`, and "
            "say why in the commit."
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
