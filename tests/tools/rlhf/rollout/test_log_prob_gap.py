import math

import pytest

from shared.errors import StageError
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap, log_prob_gap_limit


def test_the_limit_is_of_the_less_precise_of_both():
    assert log_prob_gap_limit("fp32", "fp32") == 1e-3
    assert log_prob_gap_limit("fp32", "bf16") == log_prob_gap_limit("bf16", "fp32") == 0.1
    assert log_prob_gap_limit("bf16", "bf16", given=0.02) == 0.02


def test_a_gap_above_the_limit_is_an_error():
    check_log_prob_gap(9e-4, 1e-3, first=True)
    for gap in (1.1e-3, math.inf, math.nan):
        with pytest.raises(StageError, match="before the first update"):
            check_log_prob_gap(gap, 1e-3, first=True)
        with pytest.raises(StageError, match="the sampler has other weights .* the same command resumes it"):
            check_log_prob_gap(gap, 1e-3, first=False)
