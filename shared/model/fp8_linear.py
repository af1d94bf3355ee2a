"""Linear layers in FP8: a mixin over column- and row-parallel classes, of Megatron-Core or derived from its."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from shared.console import log
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.kernels.fp8.tensor_state import LinearState

Direction = Literal["column", "row"]


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
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **others: Any,
    ) -> torch.Tensor:
        group = self.tp_group
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=group)
        y = fp8_linear(input, weight, self.fp8_state, self._shards(group if sequence_parallel else None))
        return y if bias is None else y + bias

    def _shards(self, sequence: torch.distributed.ProcessGroup | None) -> Shards:
        """`sequence`: the group that the input was gathered from."""
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


@cache
def _announce_foreign() -> None:
    log("fp8         amax histories of TransformerEngine are not read: the first update scales by its own amax")


@cache
def fp8_class(base: type, recipe: Fp8Recipe, layer: int, direction: Direction) -> type:
    """The class of `base` in FP8, for one layer."""
    values = {"recipe": recipe, "layer": layer, "direction": direction, "__doc__": f"`{base.__name__}` in FP8."}
    return type(f"Fp8{base.__name__}", (Fp8Linear, base), values)
