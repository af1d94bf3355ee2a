"""The report of a training run: loss, learning rate, gradient norm and throughput over the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.report import page
from shared.report.charts import Line, chart, number, smoothed
from shared.report.page import curve


def render(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], *, title: str) -> str:
    """report.html as text.

    Args:
        rows: of metrics.jsonl.
        facts: `family`, `parameters` and `dtype` of the model.
        title: the heading.
    """
    loss = curve(rows, "loss")
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
                Line(name="validation", points=curve(rows, "validation_loss"), style="two", dots=True),
            ],
        ),
        chart(
            "MTP loss, nats per target token",
            [
                Line(name="each update", points=curve(rows, "mtp_loss"), style="one"),
                Line(name="validation", points=curve(rows, "validation_mtp_loss"), style="two", dots=True),
            ],
        ),
        chart(
            "Validation, bits per byte",
            [Line(name="bits per byte", points=curve(rows, "bits_per_byte"), style="two", dots=True)],
        ),
        chart(
            "Learning rate",
            [Line(name="rate", points=curve(rows, "learning_rate"), style="one")],
            from_zero=True,
        ),
        chart(
            "Gradient norm before clipping",
            [Line(name="norm", points=curve(rows, "gradient_norm"), style="one")],
            from_zero=True,
        ),
        chart(
            "Throughput",
            [Line(name="all ranks", points=curve(rows, "tokens_per_second"), style="one")],
            unit=" tokens/s",
            from_zero=True,
        ),
        chart("Model FLOPs utilisation", [Line(name="MFU", points=curve(rows, "mfu"), style="one")], from_zero=True),
    ]
    model = f"{facts['family']}, {number(facts['parameters'])} parameters, {facts['dtype']}"
    return page.render(title=title, subtitle=model, tiles=tiles, figures=charts)


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)
