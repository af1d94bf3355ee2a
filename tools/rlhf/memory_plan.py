"""Memory of the models' states, before the work: a line of the plan for each model, bytes of a process.

Weights and what an optimizer holds of them, exactly; not activations, buffers of a reduction or what a library allocates. ZeRO
(arXiv:1910.02054, section 5) divides by the number of processes: from stage 1 on main weights and moments, from 2 on gradients,
in 3 weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shared.console import log, quantity

_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32  # of AdamW


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of a model's states on one process."""

    model: str
    weights: int
    gradients: int = 0
    main_weights: int = 0
    moments: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.main_weights + self.moments

    def line(self) -> str:
        """For the plan."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "main weights": self.main_weights,
            "moments": self.moments,
        }
        return f"{self.model} {', '.join(f'{name} {quantity(size, "bytes")}' for name, size in parts.items() if size)}"


def numbers(model: nn.Module) -> tuple[int, int, int]:
    """Trained parameters, frozen parameters, and bytes of all, of a model that is whole or cut by ZeRO-3; tied ones once."""
    trained = frozen = size = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        trained += count * parameter.requires_grad
        frozen += count * (not parameter.requires_grad)
        size += count * parameter.element_size()
    return trained, frozen, size


def trained_by_deepspeed(name: str, model: nn.Module, *, bf16: bool, zero: int, world_size: int) -> States:
    """The states of a model that a DeepSpeed engine trains, with float32 main weights in bf16, and from stage 1 on."""
    trained, frozen, _ = numbers(model)
    width = 2 if bf16 else _FLOAT32
    main = _FLOAT32 * trained if bf16 or zero else 0
    cut = world_size if zero else 1
    return States(
        model=name,
        weights=-(-width * (trained + frozen) // (world_size if zero == 3 else 1)),
        gradients=-(-width * trained // (world_size if zero >= 2 else 1)),
        main_weights=-(-main // cut),
        moments=-(-_MOMENTS * trained // cut),
    )


def trained_by_torch(name: str, model: nn.Module) -> States:
    """The states of a model that a Trainer trains without DeepSpeed: what is trained is float32, and its own main weights."""
    trained, _, size = numbers(model)
    return States(model=name, weights=size, gradients=_FLOAT32 * trained, moments=_MOMENTS * trained)


def frozen(name: str, model: nn.Module, *, sharded: bool, world_size: int) -> States:
    """A model that is only evaluated."""
    _, _, size = numbers(model)
    return States(model=name, weights=-(-size // (world_size if sharded else 1)))


def trained_by_accelerate(name: str, model: nn.Module, options: Any, *, bf16: bool, world_size: int) -> States:
    """The states of a model that one of TRL's trainers, or trlx's, trains by accelerate, with or without `--zero`."""
    if not options.zero:
        return trained_by_torch(name, model)
    return trained_by_deepspeed(name, model, bf16=bf16, zero=options.zero, world_size=world_size)


def log_memory(states: Iterable[States], *, offload: bool, zero: int) -> None:
    """The lines of the plan."""
    states = list(states)
    for each in states:
        log(f"memory    {each.line()}")
    total = sum(each.total for each in states)
    where = ""
    if offload:
        moved = sum(each.main_weights + each.moments + each.weights * (zero == 3) for each in states if each.moments)
        where = f"; {quantity(moved, 'bytes')} of it on the host"
    log(f"memory    {quantity(total, 'bytes')} of states a process, without activations{where}")
