import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from shared.model import alibi


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 40, 71, 112])
def test_slopes_are_transformers(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi.slopes(heads), theirs, atol=0, rtol=1e-6)  # last bits of powers in fp32


def test_slopes_of_forty_heads_are_the_papers():
    """32 of the series from 2^(-1/4) on, then 8 odd terms of that from 2^(-1/8) on."""
    found = alibi.slopes(40).double()
    expected = [2 ** (-n / 4) for n in range(1, 33)] + [2 ** (-n / 8) for n in range(1, 17, 2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-6)


def test_bias_falls_with_distance():
    bias = alibi.bias(torch.tensor([0.5, 0.25]), 3)
    assert bias.shape == (1, 2, 3, 3)
    assert bias[0, 0, 2].tolist() == [-1.0, -0.5, 0.0]
    assert bias[0, 1, 2].tolist() == [-0.5, -0.25, 0.0]
