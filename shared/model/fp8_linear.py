"""Linear layers in FP8: mixins over column- and row-parallel classes, of Megatron-Core or derived from its."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Norm
from shared.console import log
from shared.kernels.fp8.fused import fp8_gated_linear, fp8_normed_linear, fuses
from shared.kernels.fp8.fused_source import rms_norm
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.kernels.fp8.tensor_state import LinearState
from shared.model.norm import NormBuilder

Direction = Literal["column", "row"]


@dataclass(frozen=True, kw_only=True)
class GateAndUp:
    """fc1's output as the input of fc2, which computes SwiGLU itself; Megatron-Core hands it on to `_forward_impl`.

    Attributes:
        states: `[sequence, batch, 2 * ffn]`: gate, then up.
    """

    states: torch.Tensor


class Fp8Linear(torch.nn.Module):
    """Overrides `_forward_impl`, the product: splitting, reduction and bias around it stay those of the class below.

    The stock product hides collectives: the sequence-parallel gather and the all-reduce of the input's gradient are done here
    in front of it. An adapter that adds to the output of `_forward_impl` fits on top.

    Its state is in the checkpoint's `_extra_state`, as plain numbers (`LinearState.encode`).

    Attributes:
        recipe: of the class.
        layer: index of the decoder layer, as in `Backend`.
        direction: column- or row-parallel.
    """

    recipe: ClassVar[Fp8Recipe]
    layer: ClassVar[int]
    direction: ClassVar[Direction]
    is_expert: bool  # Megatron-Core's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8_state = LinearState(self.recipe)

    def _forward_impl(
        self,
        input: torch.Tensor | GateAndUp,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **others: Any,
    ) -> torch.Tensor:
        if isinstance(input, GateAndUp):
            return fp8_gated_linear(input.states, weight, self.fp8_state, self.shards())
        group = self.tp_group
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=group)
        y = self._fp8_product(input, weight, self.shards(group if sequence_parallel else None))
        return y if bias is None else y + bias

    def _fp8_product(self, x: torch.Tensor, weight: torch.Tensor, shards: Shards) -> torch.Tensor:
        return fp8_linear(x, weight, self.fp8_state, shards)

    def takes_gate_and_up(self, states: torch.Tensor) -> bool:
        """Whether SwiGLU of `states` can be computed as it is quantised: without adapters, which read its output, too."""
        adapted = hasattr(self, "lora_A")
        return self.direction == "row" and not adapted and fuses(states.device, states.dtype)

    def shards(self, sequence: torch.distributed.ProcessGroup | None = None) -> Shards:
        """The ranks that hold parts of the operands; `sequence`: the group that the input was gathered from."""
        tensor = (self.tp_group,) if self.tp_group.size() > 1 else ()
        # The tokens of an expert are those that this process got: no other has a part of them.
        context = parallel_state.get_context_parallel_world_size() > 1 and not self.is_expert
        return Shards(
            tokens=(parallel_state.get_context_parallel_group(),) if context else (),
            inputs=tensor if self.direction == "row" else (),
            outputs=tensor if self.direction == "column" else (),
            sequence=sequence,
        )

    def get_extra_state(self) -> torch.Tensor | None:
        return self.fp8_state.encode()

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Take the state of a checkpoint. None and no bytes, of runs without FP8, leave histories empty."""
        if state is None or not state.numel():
            return
        if state.dtype != torch.float32:  # TransformerEngine's is a pickle in bytes: it is not opened
            _announce_foreign()
            return
        self.fp8_state.decode(state)


class Fp8NormLinear(Fp8Linear):
    """A column-parallel layer with the norm in front, quantised as it is computed: named as TransformerEngine's LayerNormLinear.

    The norm is apart where its output goes through a collective first (tensor parallelism), and once the guard took the layer
    out of FP8.

    Attributes:
        norm: of the class.
        build_norm: the backend's builder of it.
    """

    norm: ClassVar[Norm]
    build_norm: ClassVar[NormBuilder]

    def __init__(self, input_size: int, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        built: Any = self.build_norm(config=config, hidden_size=input_size)
        self.layer_norm_weight: torch.nn.Parameter = built.weight

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, of `norm(input_)`."""
        if not self._together(input_):
            input_ = rms_norm(input_, self.layer_norm_weight, **self._norm())
        return super().forward(input_, *args, **kwargs)

    def _fp8_product(self, x: torch.Tensor, weight: torch.Tensor, shards: Shards) -> torch.Tensor:
        if not self._together(x):
            return super()._fp8_product(x, weight, shards)
        return fp8_normed_linear(x, self.layer_norm_weight, weight, self.fp8_state, shards, **self._norm())

    def _together(self, x: torch.Tensor) -> bool:
        whole = self.tp_group.size() == 1
        return whole and not self.fp8_state.in_bf16 and fuses(x.device, x.dtype)

    def _norm(self) -> dict[str, Any]:
        return {"epsilon": self.norm.epsilon, "zero_centered": self.norm.zero_centered_gamma}


@cache
def _announce_foreign() -> None:
    log("fp8         amax histories of TransformerEngine are not read: the first update scales by its own amax")


@cache
def fp8_class(
    base: type,
    recipe: Fp8Recipe,
    layer: int,
    direction: Direction,
    norm: tuple[Norm, NormBuilder] | None = None,
) -> type:
    """The class of `base` in FP8, for one layer; with an RMSNorm in front, of the backend's builder."""
    values = {"recipe": recipe, "layer": layer, "direction": direction, "__doc__": f"`{base.__name__}` in FP8."}
    if norm is None:
        return type(f"Fp8{base.__name__}", (Fp8Linear, base), values)
    values |= {"norm": norm[0], "build_norm": staticmethod(norm[1])}
    return type(f"Fp8Norm{base.__name__}", (Fp8NormLinear, base), values)
