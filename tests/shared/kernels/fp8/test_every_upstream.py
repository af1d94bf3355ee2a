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


def test_scaled_grouped_mm_takes_groups_of_rows_and_of_columns() -> None:
    """By the rules that torch has for it without a GPU; what it computes is tested on one."""
    ours = "shared/kernels/fp8/grouped_matmul.py"
    ends = torch.empty(2, device="meta", dtype=torch.int32)

    def codes(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=E4M3)

    for a, b, scales, shape in (
        (codes(7, 16), codes(2, 32, 16).transpose(-2, -1), ((7,), (2, 32)), (7, 32)),
        (codes(32, 48), codes(16, 48).t(), ((64,), (32,)), (2, 32, 16)),
    ):
        given = [torch.empty(each, device="meta") for each in scales]
        y = torch._scaled_grouped_mm(a, b, *given, offs=ends, out_dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == (shape, torch.bfloat16), ours
