"""vLLM's LoRA on a CPU, without the adapter of a neighbour for requests that have none.

vLLM computes a batch at once and gives tokens without an adapter the index -1. Its GPU kernels skip them; its torch kernels
(`vllm/lora/ops/torch_ops`) take -1 for an index, which is the last adapter that fits in a batch: the model's own answers change
while an adapter is asked beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class Wrapper(PunicaWrapperCPU):
    """Tokens without an adapter have 0 between A and B."""

    def _shrink_prefill(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_prefill(y, x, w_t_all, scale)
        self._spare(y)

    def _shrink_decode(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_decode(y, x, w_t_all, scale)
        self._spare(y)

    def _spare(self, y: torch.Tensor) -> None:
        """`y`: `[tokens, rank]`."""
        y.masked_fill_((self.token_lora_indices == -1).unsqueeze(1), 0.0)


def install() -> None:
    """Have engines that this process starts from now on compute adapters so."""
    from vllm.platforms import current_platform

    name = f"{__name__}.{Wrapper.__name__}"

    def get_punica_wrapper() -> Any:
        return name

    current_platform.get_punica_wrapper = get_punica_wrapper
