"""Learning rate as a pure function of the step: a resume needs no scheduler state.

Steps count from 1: `learning_rate(1)` is the rate of the first update and `learning_rate(steps)` that of the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then the named curve.

    - `cosine`: half a cosine from `peak` to `minimum` at the last step (Loshchilov & Hutter, arXiv:1608.03983);
    - `wsd`: `peak` until the last `decay_steps`, then `1 - sqrt(t)` down to `minimum` (Hagele et al.,
      arXiv:2405.18392, where it beats the linear decay);
    - `constant`: `peak`.
    """

    name: ScheduleName
    peak: float
    minimum: float
    steps: int  # updates of the whole run
    warmup_steps: int
    decay_steps: int  # wsd only

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        span = self.peak - self.minimum
        if self.name == "cosine":
            t = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
            return self.minimum + span * 0.5 * (1.0 + math.cos(math.pi * t))
        if self.name == "wsd":
            t = max(0.0, (step - (self.steps - self.decay_steps)) / max(self.decay_steps, 1))
            return self.minimum + span * (1.0 - math.sqrt(t))
        return self.peak
