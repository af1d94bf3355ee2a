import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from shared.kernels.rotary import cos_sin, rotate


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rotary_dim", "batch", "factor"), [(32, 1, 1.0), (16, 1, 1.0), (32, 3, 1.0), (8, 1, 1.2079441541679836)]
)
def test_rotation_and_gradient_are_megatrons_to_the_bit(rotary_dim, batch, factor, dtype, interleaved):
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(37, batch, 1, rotary_dim // 2, generator=generator) * 1000
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    # A part of the projection, as queries are: not contiguous.
    projected = torch.randn(37, 3, 5, 48, generator=generator).to(dtype)
    gradient = torch.randn(5, 3, 37, 32, generator=generator).to(dtype).permute(2, 1, 0, 3)
    found = []
    for apply in (
        lambda x: _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=interleaved, mscale=factor),
        lambda x: rotate(x, *cos_sin(angles, factor, dtype), interleaved=interleaved),
    ):
        leaf = projected.clone().requires_grad_()
        out = apply(leaf[..., 8:40])
        out.backward(gradient)
        assert out.dtype == dtype
        assert out.is_contiguous()
        found.append((out.detach(), leaf.grad))
    (theirs, of_theirs), (ours, of_ours) = found
    assert torch.equal(ours, theirs)
    assert torch.equal(of_ours, of_theirs)
    assert of_ours.abs().sum() > 0


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_gradient_is_that_of_finite_differences(interleaved):
    x = torch.randn(3, 2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tables = cos_sin(torch.rand(3, 1, 1, 4, dtype=torch.float64), 1.5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables, interleaved=interleaved), x)
