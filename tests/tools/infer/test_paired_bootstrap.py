"""The paired bootstrap against scipy's, and against written-out loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tools.infer.paired_bootstrap import bits_per_byte, mean, paired_bootstrap, perplexity, weighted_perplexity


def drawn(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.normal(size=count)
    return first, first + generator.normal(0.2, 0.5, size=count)


@pytest.mark.parametrize("count", [7, 60])
def test_interval_and_error_are_those_of_scipy(count):
    first, second = drawn(1, count)
    found = paired_bootstrap(first, second, mean, resamples=999, seed=5)
    wanted = stats.bootstrap(
        (second, first),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=999,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    # The same draws; the order of addition moves the last digits.
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=1e-12)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=1e-12)
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-12)
    assert found.difference == pytest.approx(second.mean() - first.mean(), abs=1e-15)
    assert found.examples == count


def test_shares_and_p_are_counts_of_the_draws():
    first, second = drawn(2)
    found = paired_bootstrap(first, second, mean, resamples=500, seed=3)
    rows = np.random.default_rng(3).integers(0, 60, (500, 60))
    differences = [float(np.mean([second[i] - first[i] for i in row])) for row in rows]
    ahead = sum(each > 0 for each in differences)
    assert found.second_larger == ahead / 500
    behind = sum(each <= 0 for each in differences)
    assert found.p == pytest.approx(2 * min(behind + 1, 500 - behind + 1) / 501)
    assert 0 < found.p < 0.2
    same = paired_bootstrap(first, first, mean, resamples=500, seed=3)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    swapped = paired_bootstrap(second, first, mean, resamples=500, seed=3)
    assert (swapped.low, swapped.high) == (-found.high, -found.low)


def test_many_examples_are_drawn_in_parts(monkeypatch):
    first, second = drawn(4)
    whole = paired_bootstrap(first, second, mean, resamples=101, seed=9)
    monkeypatch.setattr("tools.infer.paired_bootstrap._AT_ONCE", 150)
    assert paired_bootstrap(first, second, mean, resamples=101, seed=9) == whole


def test_metrics_of_sums():
    values = np.array([[[-3.0, 4.0], [-5.0, 6.0]]])
    assert bits_per_byte(values)[0] == pytest.approx(8 / 10 / math.log(2), rel=1e-15)
    assert weighted_perplexity(values)[0] == pytest.approx(math.exp(8 / 10), rel=1e-15)
    assert perplexity(values[..., 0])[0] == pytest.approx(math.exp(4), rel=1e-15)
