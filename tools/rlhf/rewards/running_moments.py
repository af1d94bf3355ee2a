"""Mean and deviation of all rewards of a run so far, by which `--normalise-rewards` scales them (arXiv:2005.12729, section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from tools.rlhf.algorithms.losses import Reduce, one_process

Normalisation = Literal["none", "scale", "standardise"]
_SMALLEST = 1e-8  # deviation: equal rewards stay equal


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Of the numbers so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def deviation(self) -> float:
        """Population standard deviation; 1 before the first number."""
        return math.sqrt(self.squares / self.count) if self.count else 1.0

    def including(self, values: Tensor, reduce: Reduce = one_process) -> RunningMoments:
        """With further numbers, those of all ranks; NaN is none. Chan, Golub and LeVeque (1979), equations 2.1.

        Args:
            values: [n].
            reduce: sum over the ranks.
        """
        known = values[~values.isnan()].double()
        count, total = reduce(torch.stack([known.new_tensor(len(known)), known.sum()])).tolist()
        if not count:
            return self
        squares = reduce(((known - total / count) ** 2).sum()).item()
        distance, whole = total / count - self.mean, self.count + count
        return RunningMoments(
            count=whole,
            mean=self.mean + distance * count / whole,
            squares=self.squares + squares + distance**2 * self.count * count / whole,
        )

    def scaled(self, values: Tensor, how: Normalisation) -> Tensor:
        """`values` [n] divided by the deviation, `standardise`: after the mean is subtracted."""
        if how == "none":
            return values
        return (values - (self.mean if how == "standardise" else 0.0)) / max(self.deviation, _SMALLEST)


class RewardScale:
    """What a reply's reward becomes before it is learned from. It has the moments of the rewards so far."""

    def __init__(self, how: Normalisation, clip: float | None, moments: Mapping[str, float]) -> None:
        """`moments`: of `facts` of an earlier process, or empty."""
        self._how, self._clip, self._moments = how, clip, RunningMoments(**moments)

    def __call__(self, scores: Tensor, reduce: Reduce) -> Tensor:
        """Rewards [n] of an iteration on this rank; its moments are in the scale."""
        self._moments = self._moments.including(scores, reduce)
        scores = self._moments.scaled(scores, self._how)
        return scores if self._clip is None else scores.clamp(-self._clip, self._clip)

    def facts(self) -> dict[str, float]:
        """JSON values, exact."""
        return asdict(self._moments)
