"""Calibration of a reward model: the preferences it predicts beside those of held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.report.charts import Line, chart
from shared.report.tables import table

_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs whose predicted probability of the preferred side is between `low` and `high`."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean predicted probability of the side with the higher score."""
    accuracy: float
    """Share of pairs whose chosen side has the higher score; a tie counts half."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far predicted probabilities are from what pairs show."""

    bins: tuple[Bin, ...]
    """Without empty ones."""
    pairs: int
    brier: float
    """Mean of (1 - p)^2, p the predicted probability of the chosen side: 0 is perfect, 0.25 is guessing (Brier 1950)."""
    expected_error: float
    """Mean over pairs of abs(accuracy - predicted) of their bin: ECE, arXiv:1706.04599, equation 3."""

    @property
    def facts(self) -> dict[str, float]:
        """Entries of a manifest or a line of results."""
        return {"brier": self.brier, "expected_calibration_error": self.expected_error}


def calibration(margins: Sequence[float], *, bins: int = _BINS) -> Calibration:
    """Calibration of a Bradley-Terry model on pairs.

    Args:
        margins: score(chosen) - score(rejected) of each pair, at least one; the model predicts p = 1 / (1 + exp(-margin)).
        bins: number of bins of equal width over predicted probabilities of the side with the higher score, 0.5 to 1.
    """
    width = 0.5 / bins
    places: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    brier = 0.0
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        right = 1.0 if margin > 0 else 0.0 if margin < 0 else 0.5
        chosen = confidence if margin > 0 else 1 - confidence
        brier += (1 - chosen) ** 2
        places[min(int((confidence - 0.5) / width), bins - 1)].append((confidence, right))
    found = tuple(
        Bin(
            low=0.5 + number * width,
            high=0.5 + (number + 1) * width,
            count=len(entries),
            predicted=sum(confidence for confidence, _ in entries) / len(entries),
            accuracy=sum(right for _, right in entries) / len(entries),
        )
        for number, entries in enumerate(places)
        if entries
    )
    error = sum(each.count * abs(each.accuracy - each.predicted) for each in found) / len(margins)
    return Calibration(bins=found, pairs=len(margins), brier=brier / len(margins), expected_error=error)


def figures(measured: Calibration) -> list[str]:
    """A picture of accuracy over predicted probability, and the numbers behind it."""
    at = [(100 * each.predicted, 100 * each.accuracy) for each in measured.bins]
    picture = chart(
        "Calibration on held-out pairs: accuracy over predicted probability, %",
        [
            Line(name="accuracy", points=at, style="one", dots=True),
            Line(name="calibrated", points=[(50.0, 50.0), (100.0, 100.0)], style="six"),
        ],
        over="predicted probability",
    )
    rows = [
        [f"{each.low:.2f} to {each.high:.2f}", str(each.count), f"{each.predicted:.3f}", f"{each.accuracy:.3f}"]
        for each in measured.bins
    ]
    header = ("predicted probability of the preferred side", "pairs", "mean predicted", "accuracy")
    title = f"Brier score {measured.brier:.4f}, expected calibration error {measured.expected_error:.4f}"
    return [picture, table(title, header, rows, numbers=header[1:])]
