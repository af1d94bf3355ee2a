"""Products of codes against dequantised ones in float64; operands that CUDA would take, tried on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from shared.kernels.fp8 import product as products
from shared.kernels.fp8.blockwise import spread
from shared.kernels.fp8.codes import E4M3, E5M2
from shared.kernels.fp8.product import Quantized, product

SHAPES = [(64, 128, 96), (7, 24, 5), (33, 300, 130), (1, 1, 1), (16, 129, 16)]
SCALES = ("tensor", "row", "1 x 128", "128 x 128")


def operand(rows: int, columns: int, dtype: torch.dtype, kind: str, seed: int) -> tuple[Quantized, torch.Tensor]:
    """Codes with scales of a kind, and the numbers they stand for in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, columns, generator=generator).mul(8).to(dtype)
    blocks = -(-columns // 128)
    shape = {"tensor": (), "row": (rows, 1), "1 x 128": (rows, blocks), "128 x 128": (-(-rows // 128), blocks)}[kind]
    scale = torch.rand(shape, generator=generator) + 0.1
    in_blocks = "128" in kind
    each = spread(scale, codes.shape, 128 if kind == "128 x 128" else 1) if in_blocks else scale
    return Quantized(codes=codes, scale=scale, blocks=in_blocks), codes.double() * each.double()


@pytest.mark.parametrize("cuda_rules", [False, True])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_the_numbers(shape, kind, cuda_rules):
    rows, columns, others = shape
    for left, right in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        a, numbers_a = operand(rows, columns, left, "1 x 128" if "128" in kind else kind, 3)
        b, numbers_b = operand(others, columns, right, kind, 4)
        found = product(a, b, torch.float32, cuda_rules=cuda_rules)
        exact = numbers_a @ numbers_b.t()
        # Sums of fp32; with CUDA's rules, products of rows come out in bf16: 8 bits.
        tolerance = 2.0**-8 if cuda_rules and kind == "row" else 1e-6
        assert found.dtype == torch.float32
        assert (found.double() - exact).abs().max() <= tolerance * (numbers_a.abs() @ numbers_b.abs().t()).max()


class Rules:
    """`torch._scaled_mm` with what CUDA demands and the CPU does not."""

    def __init__(self) -> None:
        self.calls = 0
        self.real = torch._scaled_mm

    def __call__(self, a, b, *, scale_a, scale_b, out_dtype):
        self.calls += 1
        assert a.is_contiguous(), "first operand row-major"
        assert b.stride(0) == 1, "second operand column-major"
        assert (a.shape[1] % 16, b.shape[1] % 16) == (0, 0), "K and N are multiples of 16"
        assert not (a.dtype == b.dtype == E5M2)
        assert scale_a.dtype == scale_b.dtype == torch.float32
        if scale_a.dim():
            assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
            assert (scale_a.is_contiguous(), scale_b.is_contiguous()) == (True, True)
            assert out_dtype == torch.bfloat16, "scales of rows have a bf16 result"
        return self.real(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)


def test_operands_are_as_cuda_wants_them(monkeypatch):
    rules = Rules()
    monkeypatch.setattr(torch, "_scaled_mm", rules)
    for shape, kind in itertools.product(SHAPES, SCALES):
        rows, columns, others = shape
        a, _ = operand(rows, columns, E5M2, "1 x 128" if "128" in kind else kind, 5)
        b, _ = operand(others, columns, E4M3, kind, 6)
        for dtype in (torch.bfloat16, torch.float32):
            assert product(a, b, dtype, cuda_rules=True).shape == (rows, others)
    assert rules.calls > 2 * len(SHAPES) * len(SCALES)
    a, _ = operand(7, 24, E4M3, "tensor", 7)
    with pytest.raises(AssertionError, match="multiples of 16"):
        product(a, a, torch.float32, cuda_rules=False)  # so the rules do refuse


def test_two_gradients_are_not_multiplied():
    a, _ = operand(4, 16, E5M2, "tensor", 8)
    with pytest.raises(AssertionError, match="E5M2"):
        product(a, a, torch.float32)


def test_no_rows_and_no_columns():
    a, _ = operand(0, 16, E4M3, "row", 9)
    b, _ = operand(4, 16, E4M3, "row", 9)
    assert product(a, b, torch.bfloat16).shape == (0, 4)
    nothing = Quantized(codes=b.codes[:, :0], scale=b.scale)
    assert torch.equal(products.product(nothing, nothing, torch.float32), torch.zeros(4, 4))
