"""Attention by `torch.nn.attention.varlen`: the flash kernel inside torch, for rows of any segments. CUDA.

Shapes: as in `variable_length`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.kernels.attention import sinks
from shared.kernels.attention.needs import FLASH, Call
from shared.kernels.attention.variable_length import Lengths, pack

_LACKS_BIAS = "no argument for a bias"
CARRIES = replace(
    FLASH,
    lacks={
        "prefix LM": "not causal",
        "ALiBi": _LACKS_BIAS,
        "rounded ALiBi": _LACKS_BIAS,
        "soft cap": "no such argument",
        "dropout": "no such argument",
    },
)


def unavailable() -> None:
    """Part of torch."""


def attend(call: Call) -> Tensor:
    """As `choose.attend`."""
    packed = pack(call)
    kernel = _Kernel(
        lengths=packed.lengths,
        scale=call.scale,
        window=flash_window(call.features.window),
        grouped=call.q_BHQD.shape[1] != call.k_BGKD.shape[1],
    )
    if call.features.sinks_H is not None:
        return packed.unpack(sinks.attend(packed, call.features.sinks_H, kernel))
    return packed.unpack(kernel.forward(packed.q_THW, packed.k_TGW, packed.v_TGW)[0])


def flash_window(window: int | None) -> tuple[int, int]:
    """A window of keys, the query's own included, as flash kernels count: keys before and after that one; -1 for all."""
    return (-1 if window is None else window - 1, 0)


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """The flash kernel as `sinks.Kernel`. `forward` is differentiable by itself, without regard to `lse`."""

    lengths: Lengths
    scale: float
    window: tuple[int, int]
    grouped: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.attention import varlen  # imports torch's compiler: seconds

        out, lse = varlen.varlen_attn(
            q,
            k,
            v,
            self.lengths.queries_N1,
            self.lengths.keys_N1,
            self.lengths.longest_queries,
            self.lengths.longest_keys,
            return_aux=varlen.AuxRequest(lse=True),
            scale=self.scale,
            window_size=self.window,
            enable_gqa=self.grouped,
        )
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> sinks.Gradients:
        found: sinks.Gradients = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out,
            lse,
            self.lengths.queries_N1,
            self.lengths.keys_N1,
            self.lengths.longest_queries,
            self.lengths.longest_keys,
            self.window == (-1, 0),  # is_causal: with a window, the window's right end is what makes it causal
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # state of the dropout that there is not
            self.scale,
            list(self.window),
        )
        return found
