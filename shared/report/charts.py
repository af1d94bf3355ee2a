"""Line charts as inline SVG, without scripts, fonts or external files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 34
_MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    name: str
    points: Points  # (step, value), ascending by step
    style: str  # CSS class
    dots: bool = False


def chart(title: str, lines: Sequence[Line], *, unit: str = "", from_zero: bool = False, over: str = "updates") -> str:
    """A `<figure>` of curves over steps, with a legend and last values; an empty string without points.

    `over`: what a step is, for those who do not see the picture.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    values = [value for line in drawn for _, value in line.points]
    steps = [step for line in drawn for step, _ in line.points]
    x_ticks = ticks(min(steps), max(steps), 6)
    y_ticks = ticks(0.0 if from_zero else min(values), max(values), 5)
    x_low, x_high = min(steps), max(*steps, min(steps) + 1)
    y_low, y_high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def x(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{number(tick)}</text>')
    for line in drawn:
        points = thinned(line.points)
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        if len(points) > 1:
            parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.dots or len(points) == 1:
            parts += [f'<circle class="{line.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in points]
    legend = "".join(
        f'<span class="{line.style}"><i></i>{escape(line.name)} <b>{number(line.points[-1][1])}</b>{escape(unit)}</span>'
        for line in drawn
    )
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2><div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over {escape(over)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def thinned(points: Points) -> Points:
    """At most 400 points: means of groups of neighbours; the first and the last point are kept."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    means = [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


def smoothed(points: Points, weight: float = 0.9) -> Points:
    """Exponential moving average of the values, with bias correction."""
    average, norm, out = 0.0, 0.0, []
    for step, value in points:
        average = weight * average + (1.0 - weight) * value
        norm = weight * norm + (1.0 - weight)
        out.append((step, average / norm))
    return out


def ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from `low` or below to `high` or above."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short text of a number: 12.3 k, 4.57, 3e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.2e}".replace("e-0", "e-") if size < 1e-3 else f"{value:.4g}"
