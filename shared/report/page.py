"""report.html: a run's curves and facts in one file that needs nothing but a browser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shared.report.charts import Line, chart, number, smoothed

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --paper: #f6f7f9; --card: #fff; --rule: #e4e7ec;
        --one: #2563eb; --two: #ea580c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a2b3; --paper: #12161d; --card: #1b212b; --rule: #2f3846; --one: #60a5fa; --two: #fb923c; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 24px 48px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: auto; }
h1 { font-size: 24px; font-weight: 650; margin: 0 0 4px; }
h2 { font-size: 15px; font-weight: 600; margin: 0; }
p { color: var(--dim); margin: 0 0 24px; }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 24px; }
dl div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 16px; min-width: 120px; }
dt { color: var(--dim); font-size: 12px; }
dd { margin: 0; font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums; }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 16px 4px; }
figcaption { display: flex; justify-content: space-between; gap: 16px; flex-wrap: wrap; font-size: 13px; }
figcaption span { margin-left: 14px; color: var(--dim); }
figcaption b { color: var(--ink); font-weight: 600; }
figcaption i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
svg { width: 100%; height: auto; display: block; margin-top: 8px; }
svg text { fill: var(--dim); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.one { stroke: var(--one); } polyline.two { stroke: var(--two); }
polyline.faint { stroke: var(--one); opacity: .28; stroke-width: 1; }
circle { stroke: none; } circle.one { fill: var(--one); } circle.two { fill: var(--two); } circle.faint { fill: var(--one); }
.one i { background: var(--one); } .two i { background: var(--two); } .faint i { background: var(--one); opacity: .35; }
"""


def write(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Replace the report of a run.

    Args:
        path: the file, replaced in one piece.
        rows: those of metrics.jsonl.
        facts: `family`, `parameters` and `dtype` of the model.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(render(rows, facts, title=path.parent.name), encoding="utf-8")
    os.replace(partial, path)


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], *, title: str) -> str:
    """The page as text."""
    loss = _curve(rows, "loss")
    tiles = {
        "updates": f"{rows[-1]['step']:,}" if rows else "0",
        "tokens": number(_last(rows, "tokens") or 0),
        "loss": _shown(_last(rows, "loss")),
        "validation loss": _shown(_last(rows, "validation_loss")),
        "bits per byte": _shown(_last(rows, "bits_per_byte")),
        "tokens per second": _shown(_last(rows, "tokens_per_second")),
        "MFU": _shown(_last(rows, "mfu")),
    }
    charts = [
        chart(
            "Loss, nats per target token",
            [
                Line(name="each update", points=loss, style="faint"),
                Line(name="smoothed", points=smoothed(loss), style="one"),
                Line(name="validation", points=_curve(rows, "validation_loss"), style="two", dots=True),
            ],
        ),
        chart(
            "Loss of tokens further ahead, nats per target token",
            [
                Line(name="each update", points=_curve(rows, "mtp_loss"), style="one"),
                Line(name="validation", points=_curve(rows, "validation_mtp_loss"), style="two", dots=True),
            ],
        ),
        chart(
            "Validation, bits per byte",
            [Line(name="bits per byte", points=_curve(rows, "bits_per_byte"), style="two", dots=True)],
        ),
        chart(
            "Learning rate",
            [Line(name="rate", points=_curve(rows, "learning_rate"), style="one")],
            from_zero=True,
        ),
        chart(
            "Gradient norm before clipping",
            [Line(name="norm", points=_curve(rows, "gradient_norm"), style="one")],
            from_zero=True,
        ),
        chart(
            "Throughput",
            [Line(name="all ranks", points=_curve(rows, "tokens_per_second"), style="one")],
            unit=" tokens/s",
            from_zero=True,
        ),
        chart("Model FLOPs utilisation", [Line(name="MFU", points=_curve(rows, "mfu"), style="one")], from_zero=True),
    ]
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items() if value)
    model = f"{facts['family']}, {number(facts['parameters'])} parameters, {facts['dtype']}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<main><h1>{escape(title)}</h1><p>{escape(model)}</p><dl>{boxes}</dl>"
        f"<section>{''.join(charts)}</section></main></html>\n"
    )


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)
