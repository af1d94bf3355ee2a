"""The paired bootstrap: two models on the same examples.

Examples are drawn with replacement, the same ones for both models. Interval and standard error: Efron and Tibshirani, An
Introduction to the Bootstrap (1993), chapters 6 and 13. Share of draws in which a model is ahead: Koehn, Statistical
significance tests for machine translation evaluation (EMNLP 2004). p: Davison and Hinkley, Bootstrap Methods and their
Application (1997), equation 4.11, twice the smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

type Values = NDArray[np.float64]  # of one example each: [examples], or [examples, 2] with a weight
# Draws of examples, [resamples, examples] or [resamples, examples, 2] -> a number each.
type Statistic = Callable[[Values], Values]

CONFIDENCE = 0.95
_AT_ONCE = 4_000_000  # numbers drawn at once


def mean(drawn: Values) -> Values:
    """Of accuracies and the like."""
    return np.asarray(drawn.mean(axis=1))


def perplexity(drawn: Values) -> Values:
    """exp of the negative mean of log-likelihoods."""
    return np.asarray(np.exp(-drawn.mean(axis=1)))


def weighted_perplexity(drawn: Values) -> Values:
    """exp of the negative sum of log-likelihoods over the sum of weights: bytes or words."""
    return np.asarray(np.exp(-drawn[..., 0].sum(axis=1) / drawn[..., 1].sum(axis=1)))


def bits_per_byte(drawn: Values) -> Values:
    """Negative sum of log-likelihoods, in bits, over the sum of bytes."""
    return np.asarray(-drawn[..., 0].sum(axis=1) / drawn[..., 1].sum(axis=1) / math.log(2))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of the second model minus that of the first."""

    first: float
    second: float
    difference: float
    standard_error: float
    low: float  # of the interval
    high: float
    second_larger: float  # share of the draws
    p: float  # two-sided
    examples: int


def paired_bootstrap(first: Values, second: Values, statistic: Statistic, *, resamples: int, seed: int) -> Difference:
    """The difference of a metric, with its percentile interval.

    Args:
        first: values of the first model, of each example.
        second: those of the second, of the same examples in the same order.
        statistic: the metric.
        resamples: draws.
        seed: of numpy's default generator, whose draws are in [0, examples), row by row.
    """
    assert first.shape == second.shape
    count = len(first)
    generator = np.random.default_rng(seed)
    rows = max(_AT_ONCE // count, 1)
    parts = []
    for done in range(0, resamples, rows):
        drawn = generator.integers(0, count, (min(rows, resamples - done), count))
        parts.append(statistic(second[drawn]) - statistic(first[drawn]))
    differences = np.concatenate(parts)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    sides = [(1 + np.count_nonzero(side)) / (resamples + 1) for side in (differences <= 0, differences >= 0)]
    values = [float(statistic(values[None])[0]) for values in (first, second)]
    return Difference(
        first=values[0],
        second=values[1],
        difference=values[1] - values[0],
        standard_error=float(differences.std(ddof=1)) if resamples > 1 else 0.0,
        low=float(low),
        high=float(high),
        second_larger=float(np.mean(differences > 0)),
        p=float(min(1.0, 2 * min(sides))),
        examples=count,
    )
