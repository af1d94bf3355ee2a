"""Percentiles beside numpy's, and of one value."""

import numpy as np
import pytest

from tools.rlhf.quantiles import quantiles


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 200])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).normal(size=count)
    found = quantiles("reward", values.tolist())
    for percent in (10, 50, 90):
        assert found[f"reward_p{percent}"] == np.percentile(values, percent, method="inverted_cdf")
