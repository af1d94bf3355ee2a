"""The lowest validation loss of a run: which update had it, and how many validations ago."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

FACT = "best_validation"  # of a run directory's manifest


@dataclass(frozen=True, kw_only=True)
class Best:
    """As of an update; the same on every rank."""

    loss: float
    iteration: int  # updates done
    targets: int  # of a validation: losses over other data are not compared
    since: int = 0  # validations after it, none of which had a lower loss

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self | None:
        """From the manifest's facts of the iteration to resume from; None before the first validation that was noted."""
        return cls(**facts[FACT]) if FACT in facts else None

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {FACT: asdict(self)}


def after(best: Best | None, *, loss: float, targets: int, iteration: int) -> Best:
    """The best one after a further validation. An equal loss is no improvement, a number is one on NaN."""
    if best is None or best.targets != targets or math.isnan(best.loss) or loss < best.loss:
        return Best(loss=loss, iteration=iteration, targets=targets)
    return replace(best, since=best.since + 1)
