import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcons_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from shared.kernels.attention import alibi


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 40, 71, 112])
def test_slopes_are_transformers(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi.slopes(heads), theirs, atol=0, rtol=1e-6)  # last bits of powers in fp32


def test_slopes_of_forty_heads_are_the_papers():
    """32 of the series from 2^(-1/4) on, then 8 odd terms of that from 2^(-1/8) on."""
    found = alibi.slopes(40).double()
    expected = [2 ** (-n / 4) for n in range(1, 33)] + [2 ** (-n / 8) for n in range(1, 17, 2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-6)


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("heads", [6, 32])
def test_slopes_to_another_end_are_mpts(heads, bias_max):
    theirs = build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0]
    torch.testing.assert_close(-alibi.slopes(heads, bias_max), theirs, atol=0, rtol=1e-6)


def test_bias_falls_with_distance():
    bias = alibi.bias(torch.tensor([0.5, 0.25]), torch.arange(3), torch.arange(3))
    assert bias.shape == (1, 2, 3, 3)
    assert bias[0, 0, 2].tolist() == [-1.0, -0.5, 0.0]
    assert bias[0, 1, 2].tolist() == [-0.5, -0.25, 0.0]


@pytest.mark.parametrize("heads", [6, 32])
def test_rounded_bias_is_falcons(heads):
    """Positions past 256 and their products are not all bf16 numbers."""
    theirs = falcons_alibi(torch.ones(1, 700, dtype=torch.long), heads, torch.float32)[:, 0]
    positions = torch.arange(700)
    ours = alibi.rounded_bias(alibi.slopes(heads), positions, positions)
    for query in (0, 300, 699):
        assert torch.equal(ours[0, :, query], theirs - theirs[:, query, None])
    exact = alibi.bias(alibi.slopes(heads), positions, positions)
    assert (ours - exact).abs().max() > 0.1


def test_bias_of_some_queries_is_their_rows():
    slopes, queries, keys = alibi.slopes(6), torch.tensor([[5, 6], [2, 3]]), torch.arange(300).repeat(2, 1)
    for bias in (alibi.bias, alibi.rounded_bias):
        whole = bias(slopes, keys, keys)
        rows = bias(slopes, queries, keys)
        assert torch.equal(rows, torch.stack([whole[0][:, queries[0]], whole[1][:, queries[1]]]))
