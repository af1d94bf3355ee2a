"""The gap between the log-probabilities of sampler and trainer: whether they are one distribution."""

from __future__ import annotations

from shared.errors import StageError

# float32 sums in another order (batched, with a cache) differ by about 1e-6 on small models and 1e-4 on large ones.
FLOAT32_LIMIT = 1e-3
# Two programs that compute in bf16 differ by 5e-3 on small models, ten times that with many layers and experts.
BFLOAT16_LIMIT = 0.1


def log_prob_gap_limit(*precisions: str, given: float | None = None) -> float:
    """Largest mean gap of a roll-out, nats a token: `given`, else by the least precise of sampler and trainer."""
    if given is not None:
        return given
    return FLOAT32_LIMIT if all(precision == "fp32" for precision in precisions) else BFLOAT16_LIMIT


def check_log_prob_gap(gap: float, limit: float, *, first: bool) -> None:
    """StageError unless the mean gap of a roll-out, nats, is at most `limit`; `first`: it is the process's first roll-out."""
    if gap <= limit:  # not NaN
        return
    differ = f"the sampler's log-probabilities and the trainer's differ by {gap:.1e} nats a token"
    if first:
        raise StageError(
            f"{differ} before the first update (--log-prob-gap-limit {limit:g}): the policy would be trained on replies of "
            "another distribution. Nothing is published; if the model's code is its own, its cached and its batched forward "
            "pass disagree"
        )
    raise StageError(
        f"{differ} (--log-prob-gap-limit {limit:g}), which they did not before: the sampler has other weights than the trainer, "
        "or the policy has left what the precision can represent. The last saved state is kept, and the same command resumes it"
    )
