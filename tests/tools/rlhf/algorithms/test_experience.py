"""What an importance correction is said to do, beside a count by hand."""

import pytest
import torch

from tools.rlhf.algorithms.experience import weight_fractions
from tools.rlhf.algorithms.losses import importance_weights
from tools.rlhf.engines.distributed import DistributedContext

ALONE = DistributedContext(device=torch.device("cpu"), rank=0, world_size=1)
MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
RATIOS = torch.tensor([[1.0, 5.0, 0.1, 1.5], [3.0, 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("correction", "weight", "dropped", "capped"),
    [
        ("token_truncate", (1 + 2 + 0.1 + 1.5 + 2) / 5, 0.0, 2 / 5),
        ("token_mask", (1 + 1.5) / 5, 3 / 5, 0.0),
        ("sequence_mask", 4 * 0.75 / 5, 1 / 5, 0.0),  # the replies' products are 0.75 and 3
    ],
)
def test_weights_of_the_reply_tokens(correction, weight, dropped, capped):
    weights = importance_weights(RATIOS.log(), torch.zeros(2, 4), MASK, correction, 2.0)
    found = weight_fractions(weights, MASK, 2.0, ALONE)
    assert found == {
        "importance_weight": pytest.approx(weight),
        "importance_dropped": pytest.approx(dropped),
        "importance_capped": pytest.approx(capped),
    }
