"""Products of bf16 and of FP8 matrices on a CPU without bf16 units, by its fp32 units: `install()`, for a process of a benchmark.

torch multiplies bf16 matrices on such CPUs by a loop that is four to seventy times slower than its fp32 product, and decodes FP8
numbers one by one. A product of two bf16 or FP8 numbers is exact in fp32, and both ways sum in fp32 and round the sum once:
results differ by the order of the sum only, that is in the last bit of a few in ten thousand.

- Attention in bf16 is computed in fp32 and rounded once: torch's kernel rounds the probabilities to bf16, too.
- Blocks of FP8 with scales are multiplied by their scales before the product and not after: 2^-24 of each summand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared.kernels.fp8 import product
from shared.kernels.fp8.blockwise import BLOCK, row_scales

_UNITS = ("avx512_bf16", "amx_bf16", "bf16 ")  # in /proc/cpuinfo, of x86 and of ARM
_LIBRARY: list[torch.library.Library] = []


def needed() -> bool:
    """Whether this CPU has no bf16 units."""
    return not any(unit in Path("/proc/cpuinfo").read_text(encoding="utf-8") for unit in _UNITS)


def install() -> None:
    """Replace torch's products of bf16 matrices on CPUs, and ours of FP8 blocks, in this process."""
    library = torch.library.Library("aten", "IMPL")
    for name, replacement in (("mm", _mm), ("bmm", _bmm), ("addmm", _addmm), ("_scaled_mm", _scaled_mm)):
        library.impl(name, replacement, "CPU", allow_override=True)
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        library.impl(name, _in_fp32(name), "CPU", allow_override=True, with_keyset=True)
    _LIBRARY.append(library)  # as long as it lives
    product._of_blocks = _of_blocks


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(a), b.shape[1], dtype=_wide(a))
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out).to(a.dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(a), a.shape[1], b.shape[2], dtype=_wide(a))
    return torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out).to(a.dtype)


def _addmm(added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    out = torch.empty(len(a), b.shape[1], dtype=_wide(a))
    given = (each.to(out.dtype) for each in (added, a, b))
    return torch.addmm(*given, beta=beta, alpha=alpha, out=out).to(a.dtype)


def _scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    assert (bias, scale_result) == (None, None)  # as shared.kernels.fp8 calls it
    y = torch.mm(decoded(a), decoded(b.t()).t(), out=torch.empty(len(a), b.shape[1]))
    return y.mul_(scale_a).mul_(scale_b).to(out_dtype)


def _of_blocks(a: product.Quantized, b: product.Quantized, aligned: bool) -> torch.Tensor:
    assert not aligned  # on CUDA
    left, right = (decoded(each.codes).mul_(_of_elements(each)) for each in (a, b))
    return torch.mm(left, right.t(), out=torch.empty(len(left), len(right)))


def _of_elements(x: product.Quantized) -> torch.Tensor:
    """The scale of each element of `[rows, K]`."""
    rows, columns = x.codes.shape
    return row_scales(x.scale, rows).repeat_interleave(BLOCK, 1)[:, :columns]


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """FP8 numbers as fp32, by way of fp16: E5M2 is its upper byte, E4M3 lacks 2^8. No NaN in E4M3."""
    bits = codes.contiguous().view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).float()
    return ((bits << 7) & ~(1 << 14)).view(torch.float16).float().mul_(256.0)  # the sign's copy in bit 14 is cleared


def _in_fp32(name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One of torch's attention operations, bf16 arguments as fp32 ones; results in bf16, the sums of exponentials in fp32."""
    operation = getattr(torch.ops.aten, name).default
    kernel = torch.library.get_kernel(operation, "CPU")

    def computed(keys: torch._C.DispatchKeySet, *given: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        dtype = given[0].dtype
        wide = [_widened(each) for each in given]
        results = kernel.call_boxed(keys, *wide, **{key: _widened(each) for key, each in more.items()})
        named = zip(operation._schema.returns, results, strict=True)
        return tuple(each if of.name == "logsumexp" else each.to(dtype) for of, each in named)

    return computed


def _widened(given: Any) -> Any:
    return given.float() if isinstance(given, torch.Tensor) and given.dtype == torch.bfloat16 else given


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype
