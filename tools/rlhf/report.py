"""The record of a run inside the published directory: metrics.jsonl, and report.html with its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from shared.report.charts import Line, chart
from shared.report.metrics import METRICS, read
from tools.rlhf.run_context import RunContext

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --paper: #f6f7f9; --card: #fff; --rule: #e4e7ec;
        --one: #2563eb; --two: #ea580c; --three: #0d9488; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a2b3; --paper: #12161d; --card: #1b212b; --rule: #2f3846; --one: #60a5fa;
          --two: #fb923c; --three: #2dd4bf; }
}
body { margin: 0; padding: 32px 24px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: auto; }
h1 { font-size: 24px; margin: 0 0 16px; } h2 { font-size: 15px; font-weight: 600; margin: 0; }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 24px; }
dl div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 16px; }
dt { color: var(--dim); font-size: 12px; } dd { margin: 0; font-weight: 600; }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 16px; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; gap: 16px; flex-wrap: wrap; font-size: 13px; }
figcaption span { margin-left: 14px; color: var(--dim); } figcaption b { color: var(--ink); }
figcaption i { display: inline-block; width: 12px; height: 3px; margin-right: 6px; vertical-align: middle; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim); font-size: 11px; }
svg .grid { stroke: var(--rule); } polyline { fill: none; stroke-width: 1.8; }
polyline.one { stroke: var(--one); } polyline.two { stroke: var(--two); } polyline.three { stroke: var(--three); }
circle.one { fill: var(--one); } circle.two { fill: var(--two); } circle.three { fill: var(--three); }
.one i { background: var(--one); } .two i { background: var(--two); } .three i { background: var(--three); }
"""
_COLOURS = ("one", "two", "three")


def add_record(
    context: RunContext, *, title: str, facts: Mapping[str, Any], charts: Mapping[str, Sequence[str]]
) -> None:
    """Put the run's metrics.jsonl and report.html into the directory being published; rank 0 only.

    Args:
        context: the run.
        title: the report's heading.
        facts: shown as a list of values.
        charts: title -> names of the metrics it draws.
    """
    assert context.out is not None, "rank 0 holds the directory in the making"
    record = context.state.path / METRICS
    (context.out.path / METRICS).write_bytes(record.read_bytes())
    (context.out.path / REPORT).write_text(page(title, read(record), facts, charts), encoding="utf-8")


def page(
    title: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], charts: Mapping[str, Sequence[str]]
) -> str:
    """The report as HTML that needs nothing but a browser. `rows` are those of metrics.jsonl."""
    figures = []
    for name, metrics in charts.items():
        lines = [
            Line(
                name=metric,
                points=[(row["step"], row[metric]) for row in rows if metric in row],
                style=_COLOURS[number % len(_COLOURS)],
            )
            for number, metric in enumerate(metrics)
        ]
        figures.append(chart(name, lines))
    items = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd></div>"
        for name, value in facts.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<main><h1>{escape(title)}</h1><dl>{items}</dl><section>{''.join(figures)}</section></main></html>\n"
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
