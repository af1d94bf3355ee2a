"""Learning rates against their closed forms."""

import math

import pytest

from shared.training.schedule import Schedule


def schedule(name: str, **changes) -> Schedule:
    fields = dict(name=name, peak=1.0, minimum=0.1, steps=100, warmup_steps=10, decay_steps=20)
    return Schedule(**{**fields, **changes})


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(name):
    rates = [schedule(name).learning_rate(step) for step in range(1, 11)]
    assert rates == pytest.approx([0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_no_warmup_begins_near_the_peak(name):
    assert schedule(name, warmup_steps=0).learning_rate(1) == pytest.approx(1.0, abs=1e-3)


def test_cosine():
    cosine = schedule("cosine")
    assert cosine.learning_rate(55) == pytest.approx(0.55)  # half-way: the mean of both ends
    assert cosine.learning_rate(100) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3))
    assert cosine.learning_rate(40) == pytest.approx(quarter)


def test_wsd_is_level_and_then_falls_as_one_minus_a_root():
    wsd = schedule("wsd")
    assert {wsd.learning_rate(step) for step in range(10, 81)} == {1.0}
    assert wsd.learning_rate(85) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert wsd.learning_rate(100) == pytest.approx(0.1)


def test_wsd_without_an_end_stays_level():
    assert schedule("wsd", decay_steps=0).learning_rate(100) == 1.0


def test_constant_stays():
    assert schedule("constant").learning_rate(100) == 1.0


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_never_rises_after_the_warmup(name):
    rates = [schedule(name).learning_rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
