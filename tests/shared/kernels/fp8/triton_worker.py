"""The Triton kernels in the interpreter: run as `python triton_worker.py DIRECTORY`, a process of its own.

Triton decides at import whether it interprets. Writes `DIRECTORY/results.json`: by case, the fields that differ from torch's.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from shared.kernels.fp8 import torch_coder
from shared.kernels.fp8.codes import E4M3, E5M2
from shared.kernels.fp8.fused_source import Gated, Normed
from shared.kernels.fp8.scales import scale_of
from tests.shared.kernels.fp8.test_codes import bf16_numbers, fp32_numbers

DTYPES = (E4M3, E5M2)
SHAPES = ((130, 140), (5, 129), (0, 16))


def differing(ours, theirs) -> list[str]:
    """Fields whose bytes differ; a NaN is one whatever its bits."""

    def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
        if one is None or other is None:
            return one is other
        if one.shape != other.shape or one.dtype != other.dtype or not one.is_contiguous():
            return False
        if one.is_floating_point() and one.element_size() > 1:
            return torch.equal(one.nan_to_num(nan=-1.0), other.nan_to_num(nan=-1.0))
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    return [name for name, value in vars(ours).items() if not same(value, getattr(theirs, name))]


def matrices(device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of both dtypes and orders, with rows of several sizes, zeros, subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).mul(20).exp() / 1e6
        if len(x) > 100:
            x[3] = 0.0
            x[:, 7] *= 1e-38
        for dtype in (torch.float32, torch.bfloat16) if len(x) > 100 else (torch.float32,):
            turned = (x if dtype == torch.float32 else x.t()).to(device, dtype)
            yield f"{shape} {dtype}{' strided' * (x.shape != turned.shape)}", turned


def not_finite(device: str) -> Iterator[tuple[str, torch.Tensor]]:
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(40, 140, generator=torch.Generator().manual_seed(0))
        x[36, 130] = value
        yield str(value), x.to(device)


def every_code(triton_coder, device: str) -> dict[str, list[str]]:
    """All bf16 numbers, the midpoints of FP8 numbers and their neighbours, random bits of fp32 numbers."""
    some = fp32_numbers()
    some = torch.cat([some[:5_000], some[1_000_000:]])
    numbers = {"bf16": bf16_numbers().view(256, 256).bfloat16(), "fp32": some[: len(some) // 64 * 64].view(64, -1)}
    one, found = torch.ones((), device=device), {}
    for dtype in DTYPES:
        for name, x in numbers.items():
            given = {"transposed": True, "record": True}
            ours, theirs = (
                each.encode_matrix(x.to(device), one, dtype, **given) for each in (triton_coder, torch_coder)
            )
            found[f"codes {dtype} {name}"] = differing(ours, theirs)
    return found


def compared(triton_coder, device: str) -> dict[str, list[str]]:
    """Every function, over matrices and sources."""
    found: dict[str, list[str]] = {}

    def compare(case: str, function: str, *given, **options) -> None:
        ours, theirs = (getattr(each, function)(*given, **options) for each in (triton_coder, torch_coder))
        found[f"{case} {function}" if case.startswith("source") else f"{function} {case}"] = differing(ours, theirs)

    for name, x in (*matrices(device), *not_finite(device)):
        ours, theirs = triton_coder.row_amax(x), torch_coder.row_amax(x)
        found[f"row_amax {name}"] = [] if torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)) else ["amax"]
        highest = theirs.amax() if len(x) else torch.zeros((), device=device)
        for dtype in DTYPES:
            of_rows = scale_of(theirs, dtype, power_of_two=False)
            of_tensor = scale_of(highest / 3, dtype, power_of_two=True)  # of a history: some are clipped
            compare(f"{name} {dtype} rows", "encode_matrix", x, of_rows, dtype, record=True)
            compare(f"{name} {dtype}", "encode_matrix", x, of_tensor, dtype, record=True, transposed=True)
        for dtype, rows, width, two in (
            (E4M3, 1, 128, True),
            (E5M2, 1, 128, False),
            (E4M3, 128, 128, True),
            (E4M3, 128, 128, False),
            (E5M2, 1, 32, True),
        ):
            blocks = torch_coder.Blocks(rows=rows, width=width, power_of_two=two)
            compare(f"{name} {dtype} {rows} x {width}", "encode_blocks", x, blocks, dtype, transposed=True, record=True)
    for name, source in sources(device):
        ours, theirs = triton_coder.row_amax(source), torch_coder.row_amax(source)
        found[f"source row_amax {name}"] = [] if torch.equal(ours, theirs) else ["amax"]
        of_rows, of_tensor = (scale_of(each, E4M3, power_of_two=False) for each in (theirs, theirs.amax() / 3))
        compare(f"source {name} rows", "encode_matrix", source, of_rows, E4M3, record=True)
        compare(f"source {name}", "encode_matrix", source, of_tensor, E4M3, record=True, transposed=True)
        blocks = torch_coder.Blocks(rows=1, power_of_two=True)
        compare(f"source {name} 1 x 128", "encode_blocks", source, blocks, E4M3, transposed=True, record=True)
    return found


def sources(device: str) -> Iterator[tuple[str, Gated | Normed]]:
    """SwiGLU and norms of bf16 matrices, as `[T, K]` and turned; rows and gates of several sizes."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).mul(8).exp() / 10
        return x.to(device, torch.bfloat16)

    for rows, columns in ((130, 140), (5, 129)):
        gate, up = normal(rows, 2 * columns).chunk(2, 1)
        made: dict[str, Gated | Normed] = {"gated": Gated(gate=gate, up=up)}
        for zero_centered in (False, True):
            x, weight = normal(rows, columns), normal(columns, 1).t()
            fields = {"epsilon": 1e-6, "zero_centered": zero_centered, "inverse": torch_coder.inverse_rms(x, 1e-6)}
            made["zero-centred" if zero_centered else "normed"] = Normed(x=x, weight=weight, **fields)
        for name, source in made.items():
            yield f"{name} {rows}", source
            yield f"{name} {rows} turned", source.t()


def every_gate(triton_coder, device: str) -> dict[str, list[str]]:
    """SiLU of every finite bf16 number: the gradient of `up` is that times a gradient of 1."""
    gate = bf16_numbers().bfloat16()
    gate = gate[gate.isfinite()].view(255, -1).to(device)
    one = torch.ones_like(gate)
    found = triton_coder.gated_gradient(Gated(gate=gate, up=one), one).chunk(2, 1)[1]
    wrong = found != torch.nn.functional.silu(gate)
    return {"gates": [f"{int(wrong.sum())} of {gate.numel()}"] if wrong.any() else []}


def gradients(triton_coder, device: str) -> dict[str, float]:
    """Largest difference of a source's gradient from torch's, relative to the largest number."""
    found = {}

    def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        apart = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        found[name] = float(apart) if ours.shape == theirs.shape and ours.dtype == theirs.dtype else float("inf")

    for name, source in sources(device):
        if "turned" in name:
            continue
        gradient = torch.randn(source.shape, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
        if isinstance(source, Gated):
            ours, theirs = (each.gated_gradient(source, gradient).chunk(2, 1) for each in (triton_coder, torch_coder))
            compare(f"gate {name}", ours[0], theirs[0])
            compare(f"up {name}", ours[1], theirs[1])
            continue
        ours, theirs = (each.normed_gradient(source, gradient) for each in (triton_coder, torch_coder))
        compare(f"x {name}", ours[0], theirs[0])
        compare(f"weight {name}", ours[1], theirs[1])
        compare(f"inverse {name}", triton_coder.inverse_rms(source.x, 1e-6), torch_coder.inverse_rms(source.x, 1e-6))
    return found


def main(directory: Path) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from shared.kernels.fp8 import triton_coder

    results = every_code(triton_coder, "cpu") | compared(triton_coder, "cpu") | every_gate(triton_coder, "cpu")
    results["gradients"] = gradients(triton_coder, "cpu")
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
