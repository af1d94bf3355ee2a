"""Routed experts of the local backend: Megatron-Core's SequentialMLP computed with grouped GEMM.

Parameters and checkpoint are SequentialMLP's: one weight (and bias) of each expert. The weights of all experts are one strided
tensor in memory, so no product copies them: from the last expert to the first, as Megatron-Core places parameters in a buffer.
So tokens are computed in that order: turning their groups around copies activations, which are far smaller than the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP

from shared.console import log
from shared.kernels.grouped import group_rows, grouped_linear, obstacle
from shared.model.dense_mlp import activated


class GroupedExperts(SequentialMLP):
    """SequentialMLP with one grouped GEMM for fc1 of all local experts, and one for fc2.

    Falls back to SequentialMLP's loop, and says so once, where `shared.kernels.grouped.obstacle` has a reason and where the
    backend's linear layers are not Megatron-Core's own: what they compute beside the product would be left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        other = (config.moe_apply_probs_on_input, config.fp8, config.fp4, config.bias_activation_fusion)
        assert not any(other), "not computed here"
        first = self.local_experts[0]
        linears = {type(first.linear_fc1): ColumnParallelLinear, type(first.linear_fc2): RowParallelLinear}
        self._foreign = next((own.__name__ for own, known in linears.items() if own is not known), None)
        self.place_evenly(dict(first.named_parameters()))

    def place_evenly(self, names: Iterable[str]) -> None:
        """Put the experts' parameters whose names end in `names` into one tensor each, from the last expert to the first."""
        for name in [each for each, _ in self.local_experts[0].named_parameters() if each.endswith(tuple(names))]:
            parameters = [expert.get_parameter(name) for expert in self.local_experts]
            places = torch.stack([each.data for each in parameters[::-1]])
            for parameter, place in zip(parameters[::-1], places, strict=True):
                parameter.data = place

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs of the experts, scaled by the router's probabilities.

        Args:
            permuted_local_hidden_states: `[tokens, hidden]`, sorted by expert.
            tokens_per_expert: int64 `[local experts]`.
            permuted_probs: `[tokens]`.

        Returns:
            `[tokens, hidden]`, to be summed over expert-tensor-parallel ranks, and None: biases are added.
        """
        x, counts, probs = permuted_local_hidden_states, tokens_per_expert, permuted_probs
        reason = self._obstacle(x)
        if reason or self.num_local_experts == 1:
            if reason:
                _announce(reason)
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(x, counts, probs)
            return output
        x, probs, counts = _turned(x, counts), _turned(probs, counts), counts.flip(0)
        states = self._product("linear_fc1", x, counts)
        if self.local_experts[0].linear_fc1.bias is not None:
            states = states + group_rows(torch.stack(self._each("linear_fc1", "bias")), counts)
        states = (activated(states, self.config) * probs[:, None]).to(x.dtype)
        states = self._product("linear_fc2", states, counts)
        if self.local_experts[0].linear_fc2.bias is not None:
            # Every rank adds its part: outputs are summed over expert-tensor-parallel ranks.
            biases = torch.stack(self._each("linear_fc2", "bias")) / self.tp_group.size()
            states = (states + group_rows(biases.to(probs.dtype), counts) * probs[:, None]).to(x.dtype)
        return _turned(states, counts), None

    def _product(self, linear: str, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The experts' fc1 or fc2, without bias, with the adapters of LoRA."""
        states = grouped_linear(x, self._each(linear, "weight"), counts)
        first: Any = getattr(self.local_experts[0], linear)
        if hasattr(first, "lora_A"):
            low = grouped_linear(first.dropped(x), self._each(linear, "lora_A"), counts) * first.settings.scale
            states = states + grouped_linear(low, self._each(linear, "lora_B"), counts)
        return states

    def _each(self, linear: str, name: str) -> list[torch.Tensor]:
        """A parameter of every local expert, from the last to the first."""
        return [getattr(getattr(expert, linear), name) for expert in reversed(list(self.local_experts))]

    def _obstacle(self, x: torch.Tensor) -> str | None:
        """Why the loop is needed, as a clause; None with grouped GEMM."""
        if self._foreign:
            return f"{self._foreign} computes one expert at a time"
        sizes = [size for each in self.local_experts[0].parameters() if each.dim() == 2 for size in each.shape]
        capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
        return obstacle(x.dtype, sizes, x.device, capability)


@cache
def _announce(reason: str) -> None:
    """Log the loop, once for each reason."""
    log(f"experts     one by one, not with grouped GEMM: {reason}")


def _turned(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`rows` `[tokens, ...]` with their groups from the last to the first; `counts`: rows of each group."""
    return torch.cat(rows.split(counts.tolist())[::-1])
