"""The gap between sampler and trainer over a run, `infer rollouts` beside `rlhf grpo`: `make bench-rollout-gap`.

    python tests/benchmarks/bench_rollout_gap.py [--steps 200] [--record]

A random LLaMA in fp32 on the CPU, one thread each; the policy goes to the server by broadcast. Of each learning rate: mean and
largest `log_prob_gap` of an update, its mean over the first and the last tenth of the updates, and the largest of a token. Fails
where a mean is 1e-5 nats or more, or where the last tenth is more than twice the first.
`--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_rlhf import RESULTS, make_inputs  # noqa: E402

RATES = (0.0, 1e-4)
LIMIT = 1e-5  # nats a token
GROWTH = 2.0
TRAIN = "--generations 4 --global-batch-size 8 --micro-batch-size 8 --max-new-tokens 16 --precision fp32 --track none"


def tool(name: str) -> str:
    return str(ROOT / "tools" / name / ".venv" / "bin" / name)


def train(work: Path, url: str, rate: float, steps: int) -> dict[str, float]:
    """A run's figures."""
    target = work / f"out-{rate:g}"
    words = [tool("rlhf"), "grpo", "--source", work / "policy", "--prompts", work / "prompts.jsonl", "--target", target]
    words += ["--reward", f"py:{work / 'rewards.py'}:red", "--rollouts", url, "--publish-by", "broadcast"]
    words += ["--steps", steps, "--save-every", steps, "--learning-rate", rate, *TRAIN.split()]
    subprocess.run([*map(str, words)], check=True)
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    gaps, tenth = [row["log_prob_gap"] for row in rows], max(1, steps // 10)
    return {
        "learning_rate": rate,
        "steps": len(rows),
        "gap_mean": statistics.fmean(gaps),
        "gap_largest_update": max(gaps),
        "gap_first_tenth": statistics.fmean(gaps[:tenth]),
        "gap_last_tenth": statistics.fmean(gaps[-tenth:]),
        "gap_largest_token": max(row["log_prob_gap_max"] for row in rows),
        "reward_first_tenth": statistics.fmean(row["reward"] for row in rows[:tenth]),
        "reward_last_tenth": statistics.fmean(row["reward"] for row in rows[-tenth:]),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollout-gap-") as folder:
        work = Path(folder)
        make_inputs(work, hidden=128, layers=2)  # heads of 32, the smallest for which vLLM has attention on the CPU
        words = [
            tool("infer"),
            "rollouts",
            "--source",
            work / "policy",
            "--broadcasts",
            "--port",
            0,
            "--precision",
            "fp32",
        ]
        words += ["--max-model-len", 64, "--batch-size", 16]
        server = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[1]
            runs = [train(work, url, rate, given.steps) for rate in RATES]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=120)
    text = json.dumps({"precision": "fp32", "device": "cpu", "runs": runs}, indent=2) + "\n"
    print(text)
    if given.record:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "rollout-gap-cpu.json").write_text(text, encoding="utf-8")
    if any(run["gap_mean"] >= LIMIT or run["gap_last_tenth"] > GROWTH * run["gap_first_tenth"] for run in runs):
        sys.exit("the gap is too large, or grows")


if __name__ == "__main__":
    main()
