"""What came of it: answers of the served models side by side, and the share in the form. Standard library only."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path

from real.form import FORMS, LABELS, spoken
from real.stages import ANSWERS, FORM, share

GOAL = {"json": 0.8, "sentence": 0.5}  # share of the held-out answers in the form; a haiku is no sentence
SHOWN = 8  # questions in the terminal; the page has all
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; width: 100%; } th, td { border: 1px solid #bbb; padding: .4rem .6rem;
text-align: left; vertical-align: top; } td { white-space: pre-wrap; overflow-wrap: anywhere; } .yes { background: #e2f4e2; }"""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One served model's answers."""

    model: str
    replies: list[str]
    form: str

    @property
    def share(self) -> float:
        """Of the replies in the form."""
        return share(self.replies, self.form)

    @property
    def words(self) -> float:
        """Mean of a reply."""
        return sum(len(spoken(reply)) for reply in self.replies) / len(self.replies)

    @property
    def different(self) -> int:
        """Replies, each once: one sentence for every question is a form, too."""
        return len(set(self.replies))

    def says(self) -> str:
        """The numbers."""
        return f"{self.share:6.1%} in the form, {self.words:5.1f} words, {self.different} different"


def verdict(work: Path, choices: tuple[str, ...]) -> int:
    """Print each training's table of answers and its numbers; write answers.html. Returns the exit code."""
    sections, passed = [], True
    for choice in choices:
        form = FORM[choice]
        columns = [
            Column(model=asked.model, replies=_replies(work, asked.file, asked.model), form=form)
            for asked in ANSWERS[choice]
        ]
        questions = _replies(work, ANSWERS[choice][0].file, "questions")
        print(f"{choice}: held-out questions, answers of the served models")
        for number, question in enumerate(questions[:SHOWN]):
            print(f"  {question}")
            for column in columns:
                print(f"    {column.model:8} {' '.join(column.replies[number].split())[:110]}")
        print(f"{len(questions)} held-out answers; the form: {LABELS[form]}")
        for column in columns:
            print(f"  {column.model:8} {column.says()}")
        for column in columns[1:]:
            reached = column.share >= GOAL[form]
            passed = passed and reached
            print(f"{'yes' if reached else 'NO '}  {column.model}: {column.share:.1%}, at least {GOAL[form]:.0%}")
        sections.append(section(choice, questions, columns))
    target = work / "answers.html"
    target.write_text(page(sections), encoding="utf-8")
    print(f"all answers: {target}")
    return 0 if passed else 1


def section(choice: str, questions: list[str], columns: list[Column]) -> str:
    """A table: questions down, models across; answers in the form are green."""
    form = FORM[choice]
    heads = "".join(f"<th>{html.escape(column.model)}<br>{column.says()}</th>" for column in columns)
    lines = []
    for number, question in enumerate(questions):
        replies = [column.replies[number] for column in columns]
        cells = (f'<td class="{"yes" if FORMS[form](reply) else "no"}">{html.escape(reply)}</td>' for reply in replies)
        lines.append(f"<tr><td>{html.escape(question)}</td>{''.join(cells)}</tr>")
    return (
        f"<h2>{html.escape(choice)}: {LABELS[form]}</h2>\n"
        f"<table><thead><tr><th>held-out question</th>{heads}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table>"
    )


def page(sections: list[str]) -> str:
    """The page of all trainings."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Answers of a real model</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Answers of the served models</h1>\n{chr(10).join(sections)}</body></html>\n"
    )


def _replies(work: Path, name: str, key: str) -> list[str]:
    content = json.loads((work / "answers" / f"{name}.json").read_text(encoding="utf-8"))
    return [str(reply) for reply in content[key]]
