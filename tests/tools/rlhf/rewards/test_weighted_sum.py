import math

import pytest
import torch

from tools.rlhf.rewards.spec import RewardSpec
from tools.rlhf.rewards.weighted_sum import Reward


def test_a_component_without_an_opinion_is_left_out_as_in_trl(tmp_path):
    answers = {"a": [1.0, math.nan, 3.0, math.nan], "b": [1.0, 2.0, math.nan, math.nan]}
    components = [
        (RewardSpec(weight=weight, path=tmp_path, function=name), lambda prompts, replies, name=name: answers[name])
        for name, weight in (("a", 2.0), ("b", -1.0))
    ]
    total, scores = Reward(components)([], [])
    # TRL 1.16, GRPOTrainer: (rewards_per_func * weights).nansum(dim=1), NaN where all are
    table = torch.tensor([answers["a"], answers["b"]]).T
    expected = (table * torch.tensor([2.0, -1.0])).nansum(1)
    expected[table.isnan().all(1)] = torch.nan
    torch.testing.assert_close(total, expected, equal_nan=True)
    assert total.tolist() == pytest.approx([1.0, -2.0, 6.0, math.nan], nan_ok=True)
    torch.testing.assert_close(scores["a"], torch.tensor(answers["a"]), equal_nan=True)
