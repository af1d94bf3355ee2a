"""report.html: curves and facts of a run, in one self-contained file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shared.report.charts import Line, Points, chart
from shared.report.tables import TABLE_STYLE

REPORT = "report.html"
STYLES = ("one", "two", "three", "four", "five", "six")  # CSS classes of a chart's lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --paper: #f6f7f9; --card: #fff; --rule: #e4e7ec;
        --one: #2563eb; --two: #ea580c; --three: #0d9488;
        --four: #9333ea; --five: #ca8a04; --six: #64748b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a2b3; --paper: #12161d; --card: #1b212b; --rule: #2f3846; --one: #60a5fa;
          --two: #fb923c; --three: #2dd4bf;
          --four: #c084fc; --five: #facc15; --six: #94a3b8; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 24px 48px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: auto; }
h1 { font-size: 24px; font-weight: 650; margin: 0 0 4px; }
h2 { font-size: 15px; font-weight: 600; margin: 0; }
p { color: var(--dim); margin: 0 0 24px; }
h1 + dl { margin-top: 16px; }
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
polyline.one { stroke: var(--one); } polyline.two { stroke: var(--two); } polyline.three { stroke: var(--three); }
polyline.four { stroke: var(--four); } polyline.five { stroke: var(--five); } polyline.six { stroke: var(--six); }
polyline.faint { stroke: var(--one); opacity: .28; stroke-width: 1; }
circle { stroke: none; } circle.one { fill: var(--one); } circle.two { fill: var(--two); } circle.three { fill: var(--three); }
circle.four { fill: var(--four); } circle.five { fill: var(--five); } circle.six { fill: var(--six); }
circle.faint { fill: var(--one); }
figure pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 0; font: 13px/1.45 ui-monospace, monospace; }
figure dl.replies { display: block; } dl.replies div { margin-top: 8px; }
dl.replies dd { font-size: 13px; font-weight: 400; white-space: pre-wrap; overflow-wrap: anywhere; }
.one i { background: var(--one); } .two i { background: var(--two); } .three i { background: var(--three); }
.four i { background: var(--four); } .five i { background: var(--five); } .six i { background: var(--six); }
.faint i { background: var(--one); opacity: .35; }
"""


def render(
    *, title: str, subtitle: str = "", tiles: Mapping[str, str], figures: Sequence[str], tables: Sequence[str] = ()
) -> str:
    """The page as text.

    Args:
        title: the heading.
        subtitle: a line below it.
        tiles: name -> value; empty values are left out.
        figures: from `chart` or `line_charts`.
        tables: from `table`, each as wide as the page.
    """
    heading = f"<h1>{escape(title)}</h1>" + (f"<p>{escape(subtitle)}</p>" if subtitle else "")
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items() if value
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{TABLE_STYLE if tables else ''}</style>"
        f"<main>{heading}<dl>{boxes}</dl>"
        + (f'<section class="tables">{"".join(tables)}</section>' if tables else "")
        + (f"<section>{''.join(figures)}</section>" if figures or not tables else "")
        + "</main></html>\n"
    )


def quoted(title: str, text: str, answers: Mapping[str, str]) -> str:
    """A `<figure>` of a text, as it is, and of what was said to it: heading -> answer."""
    said = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(answer)}</dd></div>" for name, answer in answers.items())
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2></figcaption><pre>{escape(text)}</pre>"
        f'<dl class="replies">{said}</dl></figure>'
    )


def write(path: Path, page: str) -> None:
    """Replace the report of a run atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> Points:
    """The points of a metric in the rows of metrics.jsonl."""
    return [(row["step"], row[name]) for row in rows if name in row]


def line_charts(rows: Sequence[Mapping[str, Any]], charts: Mapping[str, Sequence[str]]) -> list[str]:
    """One figure per chart. `charts`: title -> names of its metrics."""
    return [
        chart(
            title,
            [
                Line(name=metric, points=curve(rows, metric), style=STYLES[number % len(STYLES)])
                for number, metric in enumerate(metrics)
            ],
        )
        for title, metrics in charts.items()
    ]
