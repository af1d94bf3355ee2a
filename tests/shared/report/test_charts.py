"""Curves as SVG."""

import re

import pytest

from shared.report.charts import Line, chart, number, smoothed, thinned, ticks


def test_a_curve_runs_from_corner_to_corner():
    svg = chart("t", [Line(name="up", points=[(0, 0.0), (10, 10.0)], style="one")])
    (path,) = re.findall(r'points="([^"]+)"', svg)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in path.split())
    assert (x1, x2) == (64, 640 - 16)
    assert (y1, y2) == (260 - 34, 12)  # y grows downwards


@pytest.mark.parametrize("points", [[(5, 1.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0), (2, 0.0)]])
def test_flat_single_and_negative_curves_are_drawn(points):
    svg = chart("t", [Line(name="x", points=points, style="one")])
    assert "nan" not in svg
    assert "polyline" in svg or "circle" in svg


def test_without_points_there_is_no_chart():
    assert chart("t", [Line(name="x", points=[], style="one")]) == ""


def test_names_are_escaped():
    assert "<script>" not in chart("<script>", [Line(name="<script>", points=[(0, 1.0)], style="one")])


def test_ticks_are_round_and_cover():
    assert ticks(0, 97, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.0, 3.0, 5)[0] < 3.0 < ticks(3.0, 3.0, 5)[-1]


def test_thinning_keeps_ends_and_mean():
    points = [(step, float(step % 2)) for step in range(10_001)]
    thin = thinned(points)
    assert len(thin) <= 402
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert all(0.3 < value < 0.7 for _, value in thin[1:-1])


def test_smoothing_starts_unbiased():
    assert smoothed([(1, 4.0), (2, 4.0)]) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12_345, "12.3 k"), (3e-4, "3.00e-4"), (4.5678, "4.568"), (8.2e6, "8.2 M")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
