"""The report of a training run: loss, learning rate, gradient norm, throughput, memory and MoE over the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.checkpoint.directory.manifest import ADAPTER
from shared.kernels.fp8.recipes import KINDS
from shared.report import page
from shared.report.charts import Line, Points, chart, number, smoothed
from shared.report.page import STYLES, curve

_GIB = 1 << 30
_SHOWN = 6  # replies to a prompt
_FEW = 3  # validations: of two, before and after, nothing is lowest
_MOE = "moe_"  # prefix of the metrics of MoE layers
_FP8 = {"clipped": "clipped", "underflow": "rounded to zero"}  # shares of elements


def render(
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    *,
    title: str,
    device: str,
    replies: Sequence[Mapping[str, Any]] = (),
) -> str:
    """report.html as text.

    Args:
        rows: of metrics.jsonl. Every metric called `moe_*` has a chart of its own.
        facts: `family`, `parameters` and `dtype` of the model.
        title: the heading.
        device: number and name of the devices.
        replies: rows of replies.jsonl; of each prompt the first reply and the last five are shown.
    """
    loss = curve(rows, "loss")
    memory = [(step, size / _GIB) for step, size in curve(rows, "memory_bytes")]
    tiles = {
        "updates": f"{rows[-1]['step']:,}" if rows else "0",
        "tokens": number(_last(rows, "tokens") or 0),
        "loss": _shown(_last(rows, "loss")),
        "validation loss": _shown(_last(rows, "validation_loss")),
        "lowest validation loss": _lowest(curve(rows, "validation_loss")),
        "bits per byte": _shown(_last(rows, "bits_per_byte")),
        "tokens per second": _shown(_last(rows, "tokens_per_second")),
        "MFU": _shown(_last(rows, "mfu")),
        "peak memory": "" if not memory else f"{number(memory[-1][1])} GiB",
    }

    def one(title: str, metric: str, name: str, *, unit: str = "") -> str:
        return chart(title, [Line(name=name, points=curve(rows, metric), style="one")], unit=unit, from_zero=True)

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
        one("Learning rate", "learning_rate", "rate"),
        one("Gradient norm before clipping", "gradient_norm", "norm"),
        one("Throughput", "tokens_per_second", "all ranks", unit=" tokens/s"),
        one("Model FLOPs utilisation", "mfu", "MFU"),
        chart("Peak memory of rank 0", [Line(name="memory", points=memory, style="one")], unit=" GiB", from_zero=True),
        *page.line_charts(rows, {_moe_title(name): [name] for name in _moe_metrics(rows)}),
        *(_fp8_chart(rows, name, title) for name, title in _FP8.items()),
        one("FP8 tensors whose amax was above their history", "fp8_late_scales", "tensors"),
        one("FP8 tensors that the guard took to another scaling", "fp8_fallbacks", "tensors"),
        *_fp8_by_layer(rows),
    ]
    lora = f", LoRA of rank {facts[ADAPTER]['rank']}" if facts.get(ADAPTER) else ""
    model = f"{facts['family']}, {number(facts['parameters'])} parameters, {facts['dtype']}{lora}, on {device}"
    if rows and _last(rows, "mfu") is None:
        model += "; no MFU: the peak of this device is not known"
    return page.render(title=title, subtitle=model, tiles=tiles, figures=[*charts, *_replies(replies)])


def _replies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A figure for each prompt, in the order of the file, the newest reply first."""
    of_prompts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_prompts.setdefault(row["prompt"], []).append(row)
    figures = []
    for place, replies in sorted(of_prompts.items()):
        shown = replies if len(replies) <= _SHOWN else [replies[0], *replies[1 - _SHOWN :]]
        answers = {
            f"after update {row['step']:,}": row["reply"] + ("" if row["ended"] else " ...") for row in reversed(shown)
        }
        figures.append(page.quoted(f"Prompt {place + 1}", replies[-1]["text"], answers))
    return figures


def _lowest(points: Points) -> str:
    """The lowest value of several and the update that had it first."""
    if len(points) < _FEW:
        return ""
    step, value = min(points, key=lambda point: point[1])
    return f"{number(value)} after update {step:,}"


def _fp8_chart(rows: Sequence[Mapping[str, Any]], name: str, title: str) -> str:
    """A share by kind of tensor, of the layer where it is highest."""
    lines = [
        Line(name=kind, points=[(step, 100 * share) for step, share in curve(rows, f"fp8_{name}_{kind}")], style=style)
        for kind, style in zip(KINDS, STYLES, strict=False)
    ]
    return chart(f"FP8 elements {title}, in the layer with most", lines, unit="%", from_zero=True)


def _fp8_by_layer(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last shares over layers, from 0."""
    last: Mapping[str, Any] = next((row["fp8_layers"] for row in reversed(rows) if "fp8_layers" in row), {})
    return [
        chart(
            f"FP8 elements {title} by layer, in the last update that was logged",
            [
                Line(name=kind, points=[(layer, 100 * share) for layer, share in enumerate(of_layers)], style=style)
                for (kind, of_layers), style in zip(last[name].items(), STYLES, strict=False)
            ],
            unit="%",
            from_zero=True,
        )
        for name, title in _FP8.items()
        if last
    ]


def _moe_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names in the order of their first row."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(_MOE)))


def _moe_title(metric: str) -> str:
    return f"MoE {metric.removeprefix(_MOE).replace('_', ' ')}"


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)
