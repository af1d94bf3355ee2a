"""The gap between the log-probabilities of sampler and trainer: whether they are one distribution."""

from __future__ import annotations

import math

from shared.errors import StageError
from shared.precision import TrainingPrecision

# float32 sums in another order (batched, with a cache) differ by about 1e-6 on small models and 1e-4 on large ones.
FLOAT32_LIMIT = 1e-3


def log_prob_gap_limit(precision: TrainingPrecision) -> float:
    """Largest mean gap over reply tokens before the first update, nats; none in bf16, whose rounding is of that size."""
    return FLOAT32_LIMIT if precision == "fp32" else math.inf


def check_log_prob_gap(gap: float, limit: float) -> None:
    """StageError unless the mean gap before the first update is at most `limit`; both in nats."""
    if not gap <= limit:  # NaN, too
        raise StageError(
            f"the sampler's log-probabilities and the trainer's differ by {gap:.1e} nats a token before the first update "
            f"(limit {limit:.0e} in fp32): the policy would be trained on replies of another distribution. Nothing is "
            "published; if the model's code is its own, its cached and its batched forward pass disagree"
        )
