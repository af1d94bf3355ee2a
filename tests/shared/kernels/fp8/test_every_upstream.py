"""Internals of torch that shared/kernels/fp8 relies on: docs/upstream.md."""

from __future__ import annotations

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_scaled_mm_takes_both_formats_and_both_kinds_of_scale() -> None:
    ours = "shared/kernels/fp8/product.py"
    a, b = torch.full((3, 16), 2.0), torch.full((5, 16), 0.5)
    for left, right in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        for scale_a, scale_b in (
            (torch.tensor(3.0), torch.tensor(1.0)),
            (torch.full((3, 1), 3.0), torch.ones(1, 5)),
        ):
            for dtype in (torch.bfloat16, torch.float32):
                given = {"scale_a": scale_a, "scale_b": scale_b, "out_dtype": dtype}
                y = torch._scaled_mm(a.to(left), b.to(right).t(), **given)
                assert torch.equal(y, torch.full((3, 5), 48.0, dtype=dtype)), ours
