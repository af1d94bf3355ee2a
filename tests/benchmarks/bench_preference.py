"""Rewards sampled from what `rlhf` publishes, beside a control at learning rate 0: `make bench-preference`.

    python tests/benchmarks/bench_preference.py --work DIR [--ways dpo,kto] [--seeds 3] [--replies 20] [--record]

The policy of the tests (0.1 M parameters, colour words), and the share of the word "red" in a reply as the reward: learned from
by ppo, grpo and rloo, and preferred in the pairs of dpo and kto. Each way trains with three seeds, and with the same flags at
learning rate 0. transformers' own `generate` samples the published directories, at temperature 1. What a run says of itself,
accuracy or reward, stands beside: it may be good where the policy is not.

A cell, a way with a seed, is kept at DIR when it is finished: stop at any time, and run the same command again. Ends with 1 where
a trained directory does not beat its control by 3 standard errors of the difference, or where a control's weights are not the
source's to the bit. trlx's ways are there where BATON_TRLX names it. `--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_rlhf import RESULTS, machine  # noqa: E402
from tests.benchmarks.work import run_in_process  # noqa: E402

ERRORS = 3.0  # standard errors of the difference, by which a directory beats its control
TOKENS = 16  # of a reply

_PAIRS = {"data": "pairs", "learning_rate": 1e-3}
_ONLINE = {"prompts": "prompts", "reward": "red", "max_new_tokens": TOKENS, "micro_batch_size": 32}
_GROUPS = _ONLINE | {"global_batch_size": 32, "steps": 14, "learning_rate": 3e-3}
_PPO = _ONLINE | {
    "rollout_batch_size": 32, "global_batch_size": 16, "micro_batch_size": 16, "steps": 10, "learning_rate": 2e-3,
    "kl_coefficient": 0.01,
}  # fmt: skip
_LORA = {"lora_rank": 8, "publish": "merged"}
WAYS: dict[str, dict[str, Any]] = {
    "dpo": _PAIRS | {"epochs": 2},
    "kto": _PAIRS,
    "rloo": _GROUPS | {"kl_coefficient": 0.0},
    "grpo": _GROUPS,
    "ppo": _PPO,
    "dpo --lora-rank 8": _PAIRS | _LORA | {"epochs": 6, "learning_rate": 1e-3, "beta": 0.5},
    "kto --lora-rank 8": _PAIRS | _LORA | {"learning_rate": 5e-3},
    "grpo --lora-rank 8": _GROUPS | _LORA | {"learning_rate": 8e-3},
    "ppo --lora-rank 8": _PPO | _LORA | {"learning_rate": 8e-3},
    "ppo --shared-critic": _PPO | {"shared_critic": True},
    "ppo --backend trlx": _PPO | {"backend": "trlx", "micro_batch_size": 8},
    "ppo --backend trlx --lora-rank 8": _PPO
    | _LORA
    | {"backend": "trlx", "micro_batch_size": 8, "learning_rate": 8e-3},
}
"""The command and what it is named by -> its flags; names of files are attributes of the tests' `World`."""
SIDES = ("trained", "control")

type Side = Mapping[str, Any]
type Cell = Mapping[str, Side]


def run(work: Path, way: str, seed: int, side: str) -> Path:
    """Train and publish; returns the directory. What the command says goes into a file.

    Raises:
        RuntimeError: the command failed; with its last line.
    """
    from tests.tools.rlhf.conftest import World
    from tools.rlhf.cli import tool

    world = World(work / "world")
    files = {"data": world.pairs, "prompts": world.prompts, "reward": world.reward("red")}
    flags = WAYS[way] | {name: file for name, file in files.items() if name in WAYS[way]}
    rate = {"learning_rate": 0.0} if side == "control" else {}
    target = work / "runs" / f"{side}-{way.replace(' ', '')}-{seed}"
    usual = {"source": world.policy, "target": target, "seed": seed, "overwrite": True, "track": "none"}
    said = work / "log.txt"
    with said.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            run_in_process(tool, way.partition(" ")[0], **usual | flags | rate)
        except SystemExit:
            file.flush()
            lines = said.read_text(encoding="utf-8").splitlines()
            raise RuntimeError(f"rlhf {way}, {side}, seed {seed}: {lines[-1]}") from None
    return target


def sample(directory: Path, prompts: Path, replies: int, seed: int) -> tuple[float, float, int]:
    """Mean reward of the replies that transformers samples from a directory, its standard error, and their number.

    Args:
        directory: a Hugging Face directory.
        prompts: rows with a prompt.
        replies: to each.
        seed: of sampling.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    rewards: list[float] = []
    for _ in range(replies):
        out = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS)
        for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True):
            words = text.split()
            rewards.append(words.count("red") / max(1, len(words)))
    return statistics.fmean(rewards), statistics.stdev(rewards) / math.sqrt(len(rewards)), len(rewards)


def own_word(directory: Path) -> float | None:
    """What the run says of itself: accuracy on held-out pairs, or the mean reward of its last three roll-outs."""
    facts = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["facts"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    return statistics.fmean(rewards[-3:]) if rewards else facts.get("held_out_accuracy")


def is_source(directory: Path, source: Path) -> bool:
    """Whether every weight is the source's, to the bit."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(place / "model.safetensors") for place in (directory, source))
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def measure(work: Path, way: str, seed: int, replies: int) -> dict[str, dict[str, Any]]:
    """A cell: train both sides, sample both directories."""
    found: dict[str, dict[str, Any]] = {}
    world = work / "world"
    for side in SIDES:
        directory = run(work, way, seed, side)
        reward, error, count = sample(directory, world / "prompts.jsonl", replies, 2 * seed + SIDES.index(side))
        found[side] = {"reward": reward, "error": error, "replies": count, "said": own_word(directory)}
        found[side]["moved"] = not is_source(directory, world / "policy")
        shutil.rmtree(directory)
    return found


def gain(cell: Cell) -> tuple[float, float]:
    """What is sampled above the control's reward, and its standard error."""
    trained, control = (cell[side] for side in SIDES)
    return trained["reward"] - control["reward"], math.hypot(trained["error"], control["error"])


def failures(found: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """A line for each cell that proves nothing."""
    lines = []
    for way, seeds in found.items():
        for seed, cell in seeds.items():
            more, error = gain(cell)
            if cell["control"]["moved"]:
                lines.append(f"{way}, seed {seed}: at learning rate 0 the weights are not the source's")
            if not more > ERRORS * error:
                lines.append(
                    f"{way}, seed {seed}: {more:+.3f} above its control, {ERRORS:g} errors are {ERRORS * error:.3f}"
                )
    return lines


def table(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """Markdown."""
    lines = [
        "| rlhf | sampled, by seed | control | gain in standard errors, at least | the run says |",
        "|---|---|---|---|---|",
    ]
    for way, seeds in found.items():
        cells = list(seeds.values())
        sampled, control = (" ".join(f"{cell[side]['reward']:.3f}" for cell in cells) for side in SIDES)
        by_itself = [cell["trained"]["said"] for cell in cells]
        own = "-" if None in by_itself else " ".join(f"{each:.2f}" for each in by_itself)
        errors = min(more / error for more, error in map(gain, cells))
        lines.append(f"| `{way}` | {sampled} | {control} | {errors:.0f} | {own} |")
    return "\n".join(lines)


def prepare(work: Path) -> str:
    """The world of the tests; returns a hash of the policy's weights."""
    from tests.tools.rlhf.conftest import make_world

    place = work / "world"
    if not (place / "pairs.jsonl").is_file():  # the last file of it
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        make_world(place)
    return hashlib.sha256((place / "policy" / "model.safetensors").read_bytes()).hexdigest()[:16]


def kept(path: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell, if it is of the same settings."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["cell"] if content["of"] == of else None


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="policy, runs and cells; a later run goes on there")
    parser.add_argument("--ways", help="names of ways, separated by commas; by default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--replies", type=int, default=20, help="to each of 48 prompts")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    ways = given.ways.split(",") if given.ways else [w for w in WAYS if "trlx" not in w or os.environ.get("BATON_TRLX")]
    if unknown := sorted(set(ways) - set(WAYS)):
        parser.error(f"--ways {unknown[0]}: give some of {', '.join(WAYS)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    work = given.work / "preference"
    (work / "cells").mkdir(parents=True, exist_ok=True)
    policy = prepare(work)
    described = {**machine(), "peft": metadata.version("peft"), "policy": policy}
    found: dict[str, dict[str, Cell]] = {}
    for way in ways:
        for seed in range(given.seeds):
            path = work / "cells" / f"{way.replace(' ', '')}-{seed}.json"
            of = {"machine": described, "flags": WAYS[way], "replies": given.replies}
            cell = kept(path, of)
            if cell is None:
                print(f"measuring {way}, seed {seed}", file=sys.stderr, flush=True)
                cell = measure(work, way, seed, given.replies)
                path.write_text(json.dumps({"of": of, "cell": cell}, indent=1) + "\n", encoding="utf-8")
            found.setdefault(way, {})[str(seed)] = cell
    bad = failures(found)
    verdict = "FAILED" if bad else f"every directory beats its control by {ERRORS:g} standard errors"
    print(f"{described}\n\n{table(found)}\n\n{verdict}")
    if given.record:
        content = {"machine": described, "errors": ERRORS, "failures": bad, "cells": found}
        path = given.results / "preference-cpu.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(path)
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
