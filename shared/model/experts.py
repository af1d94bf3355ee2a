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
from shared.kernels.fp8.grouped_matmul import gradient_obstacle, grouped_fp8_linear
from shared.kernels.fp8.grouped_matmul import obstacle as fp8_obstacle
from shared.kernels.grouped import group_rows, grouped_linear, obstacle
from shared.model.dense_mlp import activated
from shared.model.fp8_linear import Fp8Linear


class GroupedExperts(SequentialMLP):
    """SequentialMLP with one grouped GEMM for fc1 of all local experts, and one for fc2.

    In bf16 or in FP8. Falls back to SequentialMLP's loop, and says so once, where `obstacle` of `shared.kernels.grouped` or of
    `shared.kernels.fp8.grouped_matmul` has a reason, and where linear layers are neither Megatron-Core's own nor these in FP8:
    what they compute beside the product would be left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        other = (config.moe_apply_probs_on_input, config.fp8, config.fp4, config.bias_activation_fusion)
        assert not any(other), "not computed here"
        first = self.local_experts[0]
        linears = {first.linear_fc1: ColumnParallelLinear, first.linear_fc2: RowParallelLinear}
        self._foreign = next((type(own).__name__ for own, known in linears.items() if not _is(own, known)), None)
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
        fc1 = self.local_experts[0].linear_fc1
        if isinstance(fc1, Fp8Linear) and (reason := gradient_obstacle(fc1.recipe, x.device)):
            _announce_gradients(reason)
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
        first: Any = getattr(self.local_experts[0], linear)
        weights = self._each(linear, "weight")
        if isinstance(first, Fp8Linear):
            states = grouped_fp8_linear(x, weights, counts, self._each(linear, "fp8_state"), first.shards())
        else:
            states = grouped_linear(x, weights, counts)
        if hasattr(first, "lora_A"):
            low = grouped_linear(first.dropped(x), self._each(linear, "lora_A"), counts) * first.settings.scale
            states = states + grouped_linear(low, self._each(linear, "lora_B"), counts)
        return states

    def _each(self, linear: str, name: str) -> list[Any]:
        """A parameter or state of every local expert, from the last to the first."""
        return [getattr(getattr(expert, linear), name) for expert in reversed(list(self.local_experts))]

    def _obstacle(self, x: torch.Tensor) -> str | None:
        """Why the loop is needed, as a clause; None with grouped GEMM."""
        if self._foreign:
            return f"{self._foreign} computes one expert at a time"
        capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
        first = self.local_experts[0]
        matrices = {name: each.shape for name, each in first.named_parameters() if each.dim() == 2}
        if isinstance(first.linear_fc1, Fp8Linear):
            weights = [size for name, shape in matrices.items() if name.endswith("weight") for size in shape]
            if reason := fp8_obstacle(first.linear_fc1.recipe, weights, x.device, capability):
                return reason
            matrices = {name: shape for name, shape in matrices.items() if not name.endswith("weight")}
        return obstacle(x.dtype, [size for shape in matrices.values() for size in shape], x.device, capability)


def _is(linear: torch.nn.Module, known: type) -> bool:
    """Whether a linear layer is Megatron-Core's own, or that in FP8 and nothing more."""
    kind = type(linear)
    return kind is known or (isinstance(linear, Fp8Linear) and kind.__bases__ == (Fp8Linear, known))


@cache
def _announce(reason: str) -> None:
    """Log the loop, once for each reason."""
    log(f"experts     one by one, not with grouped GEMM: {reason}")


@cache
def _announce_gradients(reason: str) -> None:
    """Log products one by one in the backward pass, once."""
    log(f"experts     grouped GEMM in the forward pass, gradients one by one: {reason}")


def _turned(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`rows` `[tokens, ...]` with their groups from the last to the first; `counts`: rows of each group."""
    return torch.cat(rows.split(counts.tolist())[::-1])
