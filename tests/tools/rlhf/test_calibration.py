"""Brier score and expected calibration error beside numpy's arithmetic of their formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest

from tools.rlhf.calibration import calibration, figures


def test_formulas_in_float64():
    margins = np.random.default_rng(0).normal(0.4, 2.0, 500)
    measured = calibration(margins.tolist(), bins=7)
    p = 1 / (1 + np.exp(-margins))
    confidence, right = np.maximum(p, 1 - p), margins > 0
    assert measured.brier == pytest.approx(np.mean((p - 1) ** 2), rel=1e-12)
    edges = np.linspace(0.5, 1.0, 8)
    error = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert measured.expected_error == pytest.approx(error, rel=1e-12)
    assert sum(each.count for each in measured.bins) == measured.pairs == 500


def test_known_cases():
    guessing = calibration([0.0, 0.0])
    assert guessing.brier == 0.25
    assert guessing.expected_error == 0  # a tie counts half
    sure = calibration([800.0, 1e4])
    assert (sure.brier, sure.expected_error) == (0, 0)
    wrong = calibration([-800.0])
    assert wrong.brier == pytest.approx(1)
    assert wrong.expected_error == pytest.approx(1)
    margin = math.log(0.8 / 0.2)  # predicts 0.8, and 8 of 10 are so
    calibrated = calibration([margin] * 8 + [-margin] * 2)
    assert calibrated.expected_error == pytest.approx(0, abs=1e-12)
    (only,) = calibrated.bins
    assert (only.count, only.accuracy, only.predicted) == (10, 0.8, pytest.approx(0.8))


def test_the_picture_shows_every_bin():
    picture, numbers = figures(calibration([0.1, 3.0, -1.0]))
    assert picture.count('<circle class="one"') == 3
    assert numbers.count("<tr>") == 1 + 3
    assert "Brier score" in numbers
