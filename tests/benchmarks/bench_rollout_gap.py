"""The gap between sampler and trainer over a run, `infer rollouts` beside `rlhf grpo`: `make bench-rollout-gap`.

    python tests/benchmarks/bench_rollout_gap.py [--steps 200] [--rates 0 1e-4] [--work DIR] [--record]

A random LLaMA in fp32 on the CPU, one thread each; the policy goes to the server by broadcast before every update. Prompts are
longer than a block of vLLM's prefix cache and come again and again: keys and values of an older policy would show.

Of each learning rate: mean and largest `log_prob_gap` of an update, the largest of a token, the mean of the first and the last
quarter of the updates, and the slope of a line through all by least squares. Errors are standard errors over means of neighbours
(at most `BLOCKS` of them), as updates next to each other have like policies. Where a rate is not 0, what was published at the end
is then served by a server that has never had another policy, and sampled at rate 0 for a sixteenth of the steps (`gap_fresh`): a
gap there that the run's last quarter has, too, is the rounding of that policy.

Fails where a mean is 1e-5 nats or more; where the last quarter is three standard errors above a fresh server; and at rate 0 where
the gap rises by more than three standard errors of the slope. A run that was stopped goes on in `--work`. `--record` keeps the
figures in `results/`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_rlhf import RESULTS, make_inputs  # noqa: E402

RATES = (0.0, 1e-4)
LIMIT = 1e-5  # nats a token
ERRORS = 3.0  # standard errors that are not chance: once in 370 of a normal distribution
BLOCKS = 20
MODEL = {"hidden": 128, "layers": 2}  # heads of 32, the smallest for which vLLM has attention on the CPU
PROMPT = 140  # tokens; a block of the prefix cache has 128 on the CPU
TRAIN = {
    "generations": 4, "global_batch_size": 16, "micro_batch_size": 16, "max_new_tokens": 8, "precision": "fp32",
    "publish_by": "broadcast", "track": "none",
}  # fmt: skip
Figures = dict[str, Any]


def tool(name: str) -> str:
    return str(ROOT / "tools" / name / ".venv" / "bin" / name)


@contextmanager
def served(policy: Path) -> Iterator[str]:
    """The address of a server of `infer rollouts`, which ends with the block."""
    words = [tool("infer"), "rollouts", "--source", str(policy), "--broadcasts", "--port", "0", "--precision", "fp32"]
    words += ["--max-model-len", str(PROMPT + 20), "--batch-size", "16"]
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert server.stdout is not None
            ready = server.stdout.readline().split()
            if not ready:
                said.seek(0)
                raise RuntimeError(f"the server did not start: {said.read()[-2000:]}")
            yield ready[1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=300)


def train(policy: Path, work: Path, target: Path, url: str, rate: float, steps: int) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run with the inputs in `work`; a finished one is not repeated."""
    given = TRAIN | {"source": policy, "prompts": work / "prompts.jsonl", "target": target, "rollouts": url}
    given |= {"reward": f"py:{work / 'rewards.py'}:red", "steps": steps, "save_every": steps, "learning_rate": rate}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    if not target.exists():
        subprocess.run([tool("rlhf"), "grpo", *words], check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def block_means(values: Sequence[float]) -> list[float]:
    """Means of at most BLOCKS runs of neighbours, of all values; of equal length to within one."""
    count = min(BLOCKS, len(values))
    edges = [len(values) * block // count for block in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in pairwise(edges)]


def mean(values: Sequence[float]) -> Figures:
    """With the standard error, None of fewer than two values."""
    blocks = block_means(values)
    error = statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}


def slope(values: Sequence[float]) -> Figures:
    """Of a line by least squares through the blocks' means, nats per 100 updates; None of fewer than three blocks."""
    heights = block_means(values)
    places = [(block + 0.5) * len(values) / len(heights) / 100 for block in range(len(heights))]
    if len(heights) < 3:
        return {"per_100": None, "error": None}
    found = statistics.linear_regression(places, heights)
    rest = [y - found.intercept - found.slope * x for x, y in zip(places, heights, strict=True)]
    middle = statistics.fmean(places)
    spread = sum((x - middle) ** 2 for x in places)
    error = math.sqrt(sum(value**2 for value in rest) / (len(heights) - 2) / spread)
    return {"per_100": found.slope, "error": error}


def figures(rate: float, rows: Sequence[dict[str, float]], fresh: Sequence[dict[str, float]]) -> Figures:
    """A run's, and those of its published policy on a fresh server, if there are any."""
    gaps, quarter = [row["log_prob_gap"] for row in rows], max(1, len(rows) // 4)
    return {
        "learning_rate": rate,
        "steps": len(rows),
        "gap": mean(gaps),
        "gap_slope": slope(gaps),
        "gap_first_quarter": mean(gaps[:quarter]),
        "gap_last_quarter": mean(gaps[-quarter:]),
        "gap_fresh": mean([row["log_prob_gap"] for row in fresh]) | {"steps": len(fresh)} if fresh else None,
        "gap_largest_update": max(gaps),
        "gap_largest_token": max(row["log_prob_gap_max"] for row in rows),
        "reward_first_quarter": statistics.fmean(row["reward"] for row in rows[:quarter]),
        "reward_last_quarter": statistics.fmean(row["reward"] for row in rows[-quarter:]),
    }


def failures(run: Figures) -> list[str]:
    """What is wrong with a run, in words."""
    name, found = f"rate {run['learning_rate']:g}", []
    if not run["gap"]["mean"] < LIMIT:
        found.append(f"{name}: mean gap {run['gap']['mean']:.1e}, the limit is {LIMIT:g} nats")
    rise, last, fresh = run["gap_slope"], run["gap_last_quarter"], run["gap_fresh"]
    above = None  # of what a fresh server has, standard errors
    if fresh and last["error"] is not None:
        above = (last["mean"] - fresh["mean"]) / math.hypot(last["error"], fresh["error"])
        if above > ERRORS:
            found.append(f"{name}: the last quarter is {above:.1f} standard errors above the gap of a fresh server")
    if above is None and rise["error"] is not None and rise["per_100"] > ERRORS * rise["error"]:
        found.append(f"{name}: the gap rises by {rise['per_100']:.1e} nats in 100 updates")
    return found


def measure(work: Path, rates: Sequence[float], steps: int) -> list[Figures]:
    """Of each rate; inputs, runs and their policies stay in `work`."""
    if not (work / "rewards.py").exists():  # written last
        make_inputs(work, MODEL["hidden"], MODEL["layers"], PROMPT)
    targets = {rate: work / f"rate-{rate:g}" for rate in rates}
    with served(work / "policy") if not all(map(Path.exists, targets.values())) else nullcontext("") as url:
        rows = {rate: train(work / "policy", work, target, url, rate, steps) for rate, target in targets.items()}
    fresh: dict[float, list[dict[str, float]]] = {}
    for rate in filter(None, rates):
        with served(targets[rate]) as url:
            fresh[rate] = train(targets[rate], work, work / f"fresh-{rate:g}", url, 0.0, max(2, steps // 16))
    return [figures(rate, rows[rate], fresh.get(rate, ())) for rate in rates]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--work", type=Path, help="a folder that stays, and in which a stopped measurement goes on")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends, too
    with tempfile.TemporaryDirectory(prefix="rollout-gap-") as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        runs = measure(work, given.rates, given.steps)
    settings = {**MODEL, "prompt_tokens": PROMPT, **TRAIN}
    content = {"device": "CPU", "cores": os.cpu_count(), "settings": settings, "runs": runs}
    text = json.dumps(content, indent=1) + "\n"
    print(text)
    if given.record:
        given.results.mkdir(exist_ok=True)
        (given.results / "rollout-gap-cpu.json").write_text(text, encoding="utf-8")
    if wrong := [line for run in runs for line in failures(run)]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
