import math

import pytest

from shared.errors import StageError
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap, log_prob_gap_limit


def test_float32_has_a_limit_and_bfloat16_none():
    check_log_prob_gap(9e-4, log_prob_gap_limit("fp32"))
    check_log_prob_gap(0.2, log_prob_gap_limit("bf16"))
    for gap in (1.1e-3, math.inf, math.nan):
        with pytest.raises(StageError, match="before the first update"):
            check_log_prob_gap(gap, log_prob_gap_limit("fp32"))
