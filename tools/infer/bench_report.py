"""What `infer bench` shows: a table in the terminal and a page with charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.report.charts import Line, chart
from shared.report.page import STYLES, render

_LATENCIES = {
    "ttft_ms": "Time to first token (TTFT), ms",
    "tpot_ms": "Time per output token (TPOT), ms",
    "itl_ms": "Inter-token latency (ITL), ms",
    "e2el_ms": "Whole reply, ms",
}
_SPEEDS = {"output_tokens_per_second": "output", "total_tokens_per_second": "prompt and output"}
_COLUMNS = ("concurrency", "requests/s", "output tokens/s", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99")


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each concurrency; latencies in ms."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for each in runs:
        latencies = [f"{each[name][kind]:.1f}" for name in list(_LATENCIES)[:3] for kind in ("p50", "p99")]
        speeds = f"{each['requests_per_second']:.2f}", f"{each['output_tokens_per_second']:.1f}"
        rows.append((str(each["concurrency"]), *speeds, *latencies))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def page(report: Mapping[str, Any]) -> str:
    """Tokens per second and latencies over concurrency."""
    runs, load = report["runs"], report["load"]
    best = max(runs, key=lambda each: float(each["output_tokens_per_second"]))

    def drawn(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
        named = zip(STYLES, curves.items(), strict=False)
        lines = [Line(name=name, points=points, style=style, dots=True) for style, (name, points) in named]
        return chart(title, lines, from_zero=True, over="concurrency")

    figures = [
        drawn(
            "Tokens per second",
            {label: [(each["concurrency"], each[name]) for each in runs] for name, label in _SPEEDS.items()},
        )
    ]
    figures += [
        drawn(title, {kind: [(each["concurrency"], each[name][kind]) for each in runs] for kind in ("p50", "p99")})
        for name, title in _LATENCIES.items()
    ]
    return render(
        title=f"infer bench: {report['server']['model']}",
        subtitle=f"{report['server']['url']}, over concurrency (requests at once); client: {report['client']}",
        tiles={
            "requests of each run": str(load["requests"]),
            "prompt, tokens": str(load["input_tokens"]),
            "reply, tokens": str(load["output_tokens"]),
            "most output tokens/s": f"{best['output_tokens_per_second']:.0f} at {best['concurrency']}",
        },
        figures=figures,
    )
