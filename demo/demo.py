"""The whole pipeline on this machine: text -> tokenizer -> pretraining -> fine-tuning -> PPO -> a served model.

    python3 demo/demo.py --work DIR

Every stage is a tool's command on directories, printed before it runs. Killed or stopped, the same command resumes; finished
stages are skipped. Ends with a table and a verdict: exit code 0 if the model beats the unigram model and PPO raised the share
of replies that parse, else 1. Standard library only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import driver
import metrics
from stages import SCORED, stages

WELL_BELOW = 0.8  # maximum share of the unigram model's bits per byte; a model that uses context is far below


def main() -> int:
    """Run the unfinished stages; print the table."""
    parser = driver.parser(__doc__, work="demo-work")
    options = parser.parse_args()
    work = driver.settle(options.work)
    return driver.drive(parser, stages(work), work, options.until, verdict)


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
    lengths = {name: metrics.reply_length(work / "scores" / name) for name in SCORED}
    print("held-out requests, share of replies that complete their function as Python, and length of a reply:")
    for name, rate in rates.items():
        print(f"  {name:25}  {rate:.1%}  {lengths[name]:5.1f} characters")
    if lengths["ppo"] < lengths["sft"]:
        print(
            f"  PPO made replies shorter, {lengths['sft']:.0f} to {lengths['ppo']:.0f} characters: short bodies parse more "
            "often, so its rise is not all skill"
        )
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


if __name__ == "__main__":
    sys.exit(main())
