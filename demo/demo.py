"""The whole pipeline on this machine: text -> tokenizer -> pretraining -> fine-tuning -> PPO -> a served model.

    python3 demo/demo.py --work DIR

Every stage is a tool's command on directories, printed before it runs. Killed or stopped, the same command resumes; finished
stages are skipped. Ends with a table and a verdict: exit code 0 if the model beats the unigram model and PPO raised the share
of replies that parse, else 1. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import measure
import metrics
from stages import SCORED, Stage, stages

ROOT = Path(__file__).resolve().parents[1]
WELL_BELOW = 0.8  # maximum share of the unigram model's bits per byte; a model that uses context is far below


def main() -> int:
    """Run the unfinished stages; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("demo-work"), help="directory for everything (default: %(default)s)"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage, named as in the table")
    options = parser.parse_args()
    # Relative to the repository root if inside it, so that printed command lines can be copied.
    work = options.work.resolve()
    work = work.relative_to(ROOT) if work.is_relative_to(ROOT) else work
    os.chdir(ROOT)
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ["HF_HUB_OFFLINE"] = "1"  # no downloads
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, lambda *_: sys.exit(75))
    every = stages(work)
    if options.until and options.until not in [stage.name for stage in every]:
        parser.error(f"--until {options.until}: no such stage; one of: {', '.join(stage.name for stage in every)}")
    with (work / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"demo: another demo is at work in {work}", file=sys.stderr)
            return 2
        record = measure.Record(work / "demo.json")
        record.wait_for_earlier()
        for stage in every:
            code = run(stage, record)
            if code:
                print(
                    f"demo: `{stage.name}` ended with exit code {code}; run the same command again to resume",
                    file=sys.stderr,
                )
                if code == 2:
                    print(f"demo: if its sizes were changed since, remove {work} to start afresh", file=sys.stderr)
                return code
            if stage.name == options.until:
                return 0
        print(table(every, record))
        return verdict(work)


def run(stage: Stage, record: measure.Record) -> int:
    """Print and run one stage."""
    print(f"\n=== {stage.name}\n$ {shlex.join(stage.command)}", flush=True)
    began = time.monotonic()
    code = measure.run(stage.name, stage.command, record)
    if code == 0:
        print(f"=== {stage.name}: {stage.says() or 'done'} ({time.monotonic() - began:.0f} s)", flush=True)
    return code


def table(every: list[Stage], record: measure.Record) -> str:
    """Time, memory, size and result of every stage."""
    rows = [("stage", "time", "peak memory", "on disk", "result")]
    for stage in every:
        took = record.stages[stage.name]
        rows.append(
            (
                stage.name,
                f"{took.seconds:.0f} s",
                f"{took.peak_bytes / 2**20:.0f} MiB",
                _size(metrics.size_on_disk(stage.output)),
                stage.says(),
            )
        )
    total = sum(took.seconds for took in record.stages.values())
    largest = max(took.peak_bytes for took in record.stages.values())
    rows.append(("all", f"{total / 60:.1f} min", f"{largest / 2**20:.0f} MiB", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in (1, 2, 3) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join(["", lines[0], rule, *lines[1:-1], rule, lines[-1], ""])


def verdict(work: Path) -> int:
    """Print both metrics of every checkpoint, and whether they meet the targets."""
    unigram = json.loads((work / "unigram.json").read_text(encoding="utf-8"))
    scores = {name: metrics.bits_per_byte(work / "scores" / name) for name in SCORED}
    rates = {name: metrics.parse_rate(work / "scores" / name) for name in SCORED}
    print("held-out text, bits per byte:")
    print(f"  unigram model over bytes   {unigram['byte_unigram']:.3f}")
    print(f"  unigram model over tokens  {unigram['token_unigram']:.3f}")
    for name, score in scores.items():
        print(f"  {name:25}  {score:.3f}")
    print("held-out requests, share of replies that complete their function as Python:")
    for name, rate in rates.items():
        print(f"  {name:25}  {rate:.1%}")
    goal = WELL_BELOW * unigram["token_unigram"]
    checks = [
        (
            scores["pretrained"] < goal,
            f"pretraining beats the unigram model: {scores['pretrained']:.3f} below {goal:.3f}",
        ),
        (rates["ppo"] > rates["sft"], f"PPO raises the parse rate: {rates['sft']:.1%} to {rates['ppo']:.1%}"),
    ]
    for passed, claim in checks:
        print(f"{'yes' if passed else 'NO '}  {claim}")
    return 0 if all(passed for passed, _ in checks) else 1


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


if __name__ == "__main__":
    sys.exit(main())
