"""Tokens per second of an update here, of the same Megatron model in a plain torch loop, and of transformers: `make bench-train`.

    python tests/benchmarks/bench_train.py [--size 1m 10m ...] [--updates 21] [--record]

Three ways make the same update: gradients of a global batch in micro batches, norm clipped to 1, AdamW. "loop" is
`shared.training`, watched and recorded as in a run; "megatron" is the same model with `loss.backward()`, torch's clipping and
AdamW; "transformers" is that with transformers' model of the same configuration. AdamW is fused in all three. Ways alternate,
update by update: other load on the machine meets all of them alike; which is first changes, too. A time is the median. A ratio is
the median of the updates' ratios, with the interval that holds the true one with a probability of 95% (order statistics). The
loop's goal is 2% over "megatron".

On a CPU the arithmetic is fp32 on one thread, and time is that of the processor: other processes do not count. On a GPU it is
bf16 (autocast in the plain loops, which have fp32 weights, as the loop's main weights are) and the wall clock.

Results are compared with those recorded in `results/`: 5% fewer tokens per second, or a ratio that is 5% worse, is marked, and
the exit code is 1. `--record` replaces the record of this kind of machine. Without it nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).with_name("results")
REGRESSION = 0.05
GOAL = 0.02  # of the loop over the plain loop of the same model
WAYS = ("loop", "megatron", "transformers")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    sequence: int
    micro: int  # sequences
    global_: int  # sequences

    @property
    def tokens(self) -> int:
        return self.global_ * self.sequence


# Qwen3's kind of model: RMSNorm, RoPE, QK norm, SwiGLU. The last is Qwen3-0.6B's, for a GPU.
SHAPES = {
    "tiny": Shape(layers=1, hidden=32, ffn=64, heads=2, groups=1, vocab=128, sequence=16, micro=1, global_=2),
    "1m": Shape(layers=4, hidden=128, ffn=384, heads=4, groups=2, vocab=1024, sequence=128, micro=4, global_=16),
    "10m": Shape(layers=8, hidden=320, ffn=896, heads=8, groups=4, vocab=2048, sequence=256, micro=2, global_=8),
    "600m": Shape(
        layers=28, hidden=1024, ffn=3072, heads=16, groups=8, vocab=151_936, sequence=4096, micro=2, global_=16
    ),
}


def measure(name: str, updates: int) -> dict[str, Any]:
    """Median seconds of an update in each way, and its tokens per second. Warm-up: two updates more."""
    import torch

    from shared.report.metrics import peak_memory
    from shared.runtime.silence_warnings import silence
    from tests.benchmarks.training_ways import make

    silence()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    ways: dict[str, Callable[[int], float]] = make(SHAPES[name])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    for update in range(updates + 2):
        for way in [*WAYS[update % len(WAYS) :], *WAYS[: update % len(WAYS)]]:
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter() if on_gpu else time.process_time()
            losses[way] = ways[way](update)
            if on_gpu:
                torch.cuda.synchronize()
            ended = time.perf_counter() if on_gpu else time.process_time()
            if update >= 2:
                seconds[way].append(ended - started)
    found: dict[str, Any] = {
        way: {
            "seconds": round(statistics.median(each), 5),
            "tokens_per_second": round(SHAPES[name].tokens / statistics.median(each), 1),
            "last_loss": round(losses[way], 4),
        }
        for way, each in seconds.items()
    }
    for way in WAYS[1:]:
        ratios = sorted(map(float.__truediv__, seconds[way], seconds["loop"]))
        found[f"{way}/loop"] = round(statistics.median(ratios), 4)
        found[f"{way}/loop, 95%"] = [round(end, 4) for end in interval(ratios)]
    return found | {"updates": updates, "peak_memory_bytes": peak_memory()}


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Ends of the interval of the median of a distribution that these were drawn from, with a confidence of 95% at least.

    The k-th lowest and k-th highest: fewer than k of n lie on one side of the median with the probability of fewer than k heads.
    Of fewer than six, the lowest and the highest, which hold it less often.
    """
    number, below, k = len(ordered), 0.0, 0
    while k < number // 2 and (below := below + math.comb(number, k) / 2**number) <= 0.025:
        k += 1
    return ordered[max(k - 1, 0)], ordered[-max(k, 1)]


def over_the_goal(found: Mapping[str, Any]) -> list[str]:
    """Models of which the loop's update takes longer than the plain loop's by more than the goal."""
    marks = []
    for name, result in found.items():
        over = 1 / result["megatron/loop"] - 1
        low, high = (1 / end - 1 for end in reversed(result["megatron/loop, 95%"]))
        if over > GOAL:
            marks.append(f"{name}: {over:+.1%} over megatron ({low:+.1%} to {high:+.1%}), goal {GOAL:.0%}")
    return marks


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on; by default with the packages of training."""
    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu": cpu[1].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        **{name: metadata.version(name) for name in packages or ("torch", "megatron-core", "transformers")},
    }


def record_path(described: Mapping[str, Any], results: Path = RESULTS, *, of: str = "train") -> Path:
    """The record of this kind of machine: one for CPUs, one for each GPU."""
    return results / f"{of}-{re.sub(r'[^a-z0-9]+', '-', described['device'].lower())}.json"


def regressions(found: Mapping[str, Any], recorded: Mapping[str, Any], *, same_machine: bool) -> list[str]:
    """What is 5% worse than recorded. Tokens per second are compared on the same machine only, ratios on any."""
    marks = []
    for name, result in found.items():
        before = recorded.get(name)
        if before is None:
            continue
        speeds = result["loop"]["tokens_per_second"], before["loop"]["tokens_per_second"]
        figures = {f"{way}/loop": (result[f"{way}/loop"], before[f"{way}/loop"]) for way in WAYS[1:]}
        if same_machine:
            figures["tokens/s"] = speeds
        marks += [
            f"{name}: {what} {now:,.4g}, recorded {then:,.4g} ({now / then - 1:+.1%})"
            for what, (now, then) in figures.items()
            if now < then * (1 - REGRESSION)
        ]
    return marks


def table(found: Mapping[str, Any]) -> str:
    """Markdown. The last columns: how much longer the loop takes than the others."""
    lines = [
        "| model | loop, tokens/s | megatron, tokens/s | transformers, tokens/s | loop over megatron | loop over transformers |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        speeds = [f"{result[way]['tokens_per_second']:,.0f}" for way in WAYS]
        over = [f"{1 / result[f'{way}/loop'] - 1:+.1%}" for way in WAYS[1:]]
        lines.append(f"| {' | '.join([name, *speeds, *over])} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["1m", "10m"])
    parser.add_argument("--updates", type=int, default=21)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    found = {name: measure(name, given.updates) for name in given.size}
    described = machine()
    print(f"{described}\n\n{table(found)}", flush=True)
    path = record_path(described, given.results)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"machine": None, "results": {}}
    marks = regressions(found, before["results"], same_machine=before["machine"] == described)
    for mark in over_the_goal(found):
        print(f"ABOVE THE GOAL {mark}")
    for mark in marks:
        print(f"REGRESSION {mark}")
    if given.record:
        kept = before["results"] if before["machine"] == described else {}
        given.results.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"machine": described, "results": {**kept, **found}}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"recorded in {path}")
        return 0
    return 1 if marks else 0


if __name__ == "__main__":
    raise SystemExit(main())
