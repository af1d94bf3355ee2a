"""Attention by flash-attn 2 (package `flash_attn`, from 2.7 on). CUDA.

Shapes: as in `variable_length`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.kernels.attention import sinks
from shared.kernels.attention.needs import FLASH, Call, cannot_import
from shared.kernels.attention.variable_length import Lengths, pack
from shared.kernels.attention.varlen import flash_window

CARRIES = replace(
    FLASH,
    lacks={
        "prefix LM": "not causal",
        "rounded ALiBi": "slopes only",
    },
)


def unavailable() -> str | None:
    """Why the package cannot be used; None if it can."""
    return cannot_import("flash_attn")


def attend(call: Call) -> Tensor:
    """As `choose.attend`."""
    packed = pack(call)
    slopes = None if call.features.slopes_H is None else call.features.slopes_H.to(call.q_BHQD.device, torch.float32)
    kernel = _Kernel(
        lengths=packed.lengths,
        scale=call.scale,
        window=flash_window(call.features.window),
        softcap=call.features.softcap or 0.0,
        slopes_H=slopes,
        dropout=call.features.dropout,
    )
    if call.features.sinks_H is not None:
        return packed.unpack(sinks.attend(packed, call.features.sinks_H, kernel))
    return packed.unpack(kernel.whole(packed.q_THW, packed.k_TGW, packed.v_TGW))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kernel:
    """flash-attn's functions: `whole` is differentiable, `forward` and `backward` are its two passes (`sinks.Kernel`)."""

    lengths: Lengths
    scale: float
    window: tuple[int, int]
    softcap: float  # 0: none
    slopes_H: Tensor | None
    dropout: float

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        out: Tensor = flash_attn_varlen_func(q, k, v, **self._lengths, **self._common, window_size=self.window)
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, **self._lengths, **self._common, **self._sides, return_softmax=False
        )
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> sinks.Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            *(grad.contiguous(), q, k, v, out, lse),
            *found,
            **self._lengths,
            **self._common,
            **self._sides,
            deterministic=False,
        )
        return found

    @property
    def _lengths(self) -> dict[str, Any]:
        return {
            "cu_seqlens_q": self.lengths.queries_N1,
            "cu_seqlens_k": self.lengths.keys_N1,
            "max_seqlen_q": self.lengths.longest_queries,
            "max_seqlen_k": self.lengths.longest_keys,
        }

    @property
    def _common(self) -> dict[str, Any]:
        return {
            "dropout_p": self.dropout,
            "softmax_scale": self.scale,
            "causal": True,
            "softcap": self.softcap,
            "alibi_slopes": self.slopes_H,
        }

    @property
    def _sides(self) -> dict[str, Any]:
        return {"window_size_left": self.window[0], "window_size_right": self.window[1]}
