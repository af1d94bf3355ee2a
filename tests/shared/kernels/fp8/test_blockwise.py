"""Amax and scales of blocks against a loop over blocks."""

from __future__ import annotations

import pytest
import torch

from shared.kernels.fp8.blockwise import block_amax, row_scales, spread


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 1), (5, 129), (0, 200)])
def test_each_block_has_its_amax(shape, rows):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = block_amax(x, rows)
    wanted = [[part.abs().max().float() for part in band.split(128, 1)] for band in x.split(rows)] if shape[0] else []
    assert found.tolist() == wanted
    if shape[0]:
        assert (x.abs() <= spread(found, x.shape, rows)).all()
        assert spread(found, x.shape, rows)[-1, -1] == found[-1, -1]
        assert torch.equal(spread(row_scales(found, len(x)), x.shape, 1), spread(found, x.shape, rows))
