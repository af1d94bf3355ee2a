"""The lowest validation loss: which one, and how many validations ago."""

import pytest

from shared.training.best import Best, after


def noted(*losses: float, targets: int = 5) -> Best:
    best = None
    for iteration, loss in enumerate(losses):
        best = after(best, loss=loss, targets=targets, iteration=iteration)
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("losses", "iteration", "since"),
    [((3.0,), 0, 0), ((3.0, 2.0, 2.5), 1, 1), ((3.0, 2.0, 2.0, 2.0), 1, 2), ((3.0, 4.0, 1.0), 2, 0)],
)
def test_the_first_of_the_lowest(losses, iteration, since):
    best = noted(*losses)
    assert (best.loss, best.iteration, best.since) == (min(losses), iteration, since)


def test_a_loss_that_is_no_number_is_no_best() -> None:
    assert noted(float("nan"), 3.0, float("nan")) == Best(loss=3.0, iteration=1, targets=5, since=1)


def test_losses_over_other_targets_are_not_compared():
    assert after(noted(1.0), loss=2.0, targets=6, iteration=4) == Best(loss=2.0, iteration=4, targets=6)


def test_it_goes_through_the_manifest():
    best = noted(3.0, 2.0, 2.5)
    assert Best.of(best.facts()) == best
    assert Best.of({"loss": 1.0}) is None
