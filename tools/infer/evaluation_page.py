"""report.html of `infer evaluate`: the results, and examples with the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shared.report.page import REPORT as PAGE
from shared.report.page import render
from shared.report.tables import table

__all__ = ["PAGE", "page"]

_EXAMPLES = 10  # of each task
_PROMPT = 600  # characters of a prompt, its end


def page(model: str, report: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page as text.

    Args:
        model: name of the evaluated directory.
        report: results.json.
        samples: examples of each task, as the harness logs them.
    """
    counts = report["n-samples"]
    tiles = {
        "engine": report["engine"],
        "tasks": str(len(counts)),
        "examples": f"{sum(count['effective'] for count in counts.values()):,}",
        "chat template": "applied" if report["chat_template"] else "no",
        "seconds": f"{float(report['total_evaluation_time_seconds']):.0f}",
    }
    when = datetime.fromtimestamp(report["date"], UTC).isoformat(timespec="minutes")
    tables = [_results(report), *(_examples(task, rows) for task, rows in samples.items())]
    return render(
        title=f"{model}: evaluation",
        subtitle=f"lm-evaluation-harness {report['lm_eval_version']}, {when}",
        tiles=tiles,
        figures=(),
        tables=tables,
    )


def _results(report: Mapping[str, Any]) -> str:
    rows = []
    for task, values in report["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            better = report["higher_is_better"].get(task, {}).get(metric)
            rows.append(
                (
                    str(values.get("alias", task)),
                    metric if filter_name == "none" else f"{metric} ({filter_name})",
                    f"{value:.4f}",
                    f"± {error:.4f}" if isinstance(error, (int, float)) else "",
                    "higher" if better else "lower" if better is False else "",
                    str(report["n-shot"].get(task, "")),
                    str(report["n-samples"].get(task, {}).get("effective", "")),
                )
            )
    header = ("task", "metric", "value", "standard error", "better", "few-shot", "examples")
    return table("Results", header, rows, numbers=("value", "standard error", "few-shot", "examples"))


def _examples(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        (
            str(row["doc_id"]),
            _end(str(row["arguments"][0][0])),
            str(row["target"])[:_PROMPT],
            _answer(row["filtered_resps"]),
            ", ".join(f"{name} {_value(row[name])}" for name in row["metrics"] if name in row),
        )
        for row in rows[:_EXAMPLES]
    ]
    title = f"{task}: the first {len(shown)} of {len(rows)} examples" if len(rows) > len(shown) else f"{task}: examples"
    return table(title, ("", "prompt", "target", "answer", "metrics"), shown, numbers=("",))


def _end(text: str) -> str:
    return text if len(text) <= _PROMPT else f"…{text[-_PROMPT:]}"


def _answer(answers: Any) -> str:
    """A text, or the log-likelihoods of the choices, the largest marked."""
    if isinstance(answers, (list, tuple)) and answers and all(isinstance(each, (list, tuple)) for each in answers):
        likely = [float(each[0]) for each in answers]
        return "\n".join(f"{value:.2f}{' ◀' * (value == max(likely))}" for value in likely)
    first = answers[0] if isinstance(answers, (list, tuple)) and len(answers) == 1 else answers
    return _value(first) if isinstance(first, float) else str(first)[:_PROMPT]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):  # a log-likelihood and its bytes or words
        return " / ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
