"""FP8 at the end of an update: histories, the guard, counts for the metrics; and FP8 states of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from torch.distributed import ReduceOp, all_reduce

from shared.architecture.architecture import Architecture
from shared.console import log
from shared.kernels.fp8.recipes import KINDS, Fp8Recipe
from shared.model import te_fp8
from shared.model.fp8_linear import Fp8Linear

_FIELDS = ("clipped", "underflow", "nonzero", "late", "not_finite", "fell_back", "fallen")


@dataclass(frozen=True, kw_only=True)
class Fp8Update:
    """FP8 in one update, over all ranks.

    Attributes:
        table: counts by layer, kind of tensor (KINDS) and `_FIELDS`, float64 `[layers, 3, 7]`; MTP layers follow the decoder's.
        fallbacks: what the guard did, in words.
    """

    table: torch.Tensor
    fallbacks: list[str] = field(default_factory=list)

    @property
    def not_finite(self) -> str | None:
        """The first tensors with infinity or NaN, in words; None if there are none."""
        for layer, kind in self._of("not_finite").nonzero().tolist():
            return f"{KINDS[kind]} of the linear layers of layer {layer} have infinity or NaN"
        return None

    def row(self, *, layers: bool) -> dict[str, Any]:
        """For metrics.jsonl. Shares are of elements that are not zero; those of the layer where they are highest.

        `layers`: with the shares of each layer, from 0.
        """
        nonzero = self._of("nonzero").clamp(min=1)
        shares = {name: self._of(name) / nonzero for name in ("clipped", "underflow")}
        row: dict[str, Any] = {
            f"fp8_{name}_{kind}": _digits(share[:, index].max().item())
            for name, share in shares.items()
            for index, kind in enumerate(KINDS)
        }
        row["fp8_late_scales"] = int(self._of("late").sum())
        row["fp8_fallbacks"] = int(self._of("fallen").sum())
        if layers:
            counts = {"late_scales": self._of("late")}
            row["fp8_layers"] = {
                name: {kind: [_digits(each) for each in values[:, index].tolist()] for index, kind in enumerate(KINDS)}
                for name, values in (shares | counts).items()
            }
        return row

    def _of(self, name: str) -> torch.Tensor:
        return self.table[:, :, _FIELDS.index(name)]


def _digits(share: float) -> float:
    return float(f"{share:.3g}")


def end_update(model: list[DistributedDataParallel], device: torch.device) -> Fp8Update:
    """Append amax of the update to the histories and let the guard judge. Every rank calls this, after the optimizer's step.

    Amax and counts of a tensor are first joined over the ranks that have it or parts of it: histories and fallbacks are the
    same on all of them, in every layout.
    """
    architecture: Architecture = model[0].module.architecture
    table = torch.zeros(architecture.num_layers + architecture.mtp_depth, len(KINDS), len(_FIELDS), dtype=torch.float64)
    fallbacks: list[str] = []
    for linears, groups in (
        ([each for each in linears_of(model) if not each[1].is_expert], _dense_groups()),
        ([each for each in linears_of(model) if each[1].is_expert], _expert_groups()),
    ):
        first = all(group.rank() == 0 for group in groups)  # of the ranks that have these tensors, one counts them
        amax, counts = _joined([linear for _, linear in linears], groups, device)
        for (name, linear), of_kinds, counts_of_kinds in zip(linears, amax, counts, strict=True):
            in_bf16 = linear.fp8_state.in_bf16
            for index, kind in enumerate(KINDS):
                tensor, (clipped, underflow, nonzero) = linear.fp8_state.tensors[kind], counts_of_kinds[index]
                if in_bf16:
                    table[linear.layer, index, _FIELDS.index("fallen")] += first * (tensor.scaling != tensor.first)
                    continue
                if of_kinds[index] == float("inf"):
                    table[linear.layer, index, _FIELDS.index("not_finite")] += first
                    continue
                update = tensor.end_update(of_kinds[index], clipped, underflow, nonzero)
                fell, fallen = update.fell_back is not None, tensor.scaling != tensor.first
                row = torch.tensor([clipped, underflow, nonzero, update.late, 0, fell, fallen], dtype=torch.float64)
                table[linear.layer, index] += row * first
                if fell and first:
                    share = f"{clipped / nonzero:.2%} clipped, {underflow / nonzero:.2%} underflow"
                    fallbacks.append(f"{kind} of {name}: {share}; from now on {_WORDS[tensor.scaling]}")
    table = table.to(device)
    all_reduce(table)
    table = table.cpu()
    if table[:, :, _FIELDS.index("fell_back")].any():
        gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, fallbacks)
        fallbacks = [line for lines in gathered for line in lines]
    return Fp8Update(table=table, fallbacks=fallbacks)


_WORDS = {"current": "scaled by its own amax", "bf16": "this layer is computed in bf16"}


def linears_of(model: list[DistributedDataParallel]) -> Iterator[tuple[str, Fp8Linear]]:
    """FP8 linear layers of this rank, with names in which layers and experts are counted over all ranks."""
    for chunk in model:
        moe = chunk.module.architecture.moe
        share = moe.experts // parallel_state.get_expert_model_parallel_world_size() if moe else 0
        offset = parallel_state.get_expert_model_parallel_rank() * share
        for name, module in chunk.module.named_modules():
            if isinstance(module, Fp8Linear):
                name = re.sub(r"^decoder\.layers\.\d+", f"decoder.layers.{module.layer}", name)
                if local := re.search(r"(?<=local_experts\.)\d+", name):
                    name = name[: local.start()] + str(int(local[0]) + offset) + name[local.end() :]
                yield name, module


def _joined(
    linears: list[Fp8Linear], groups: list[Any], device: torch.device
) -> tuple[list[list[float]], list[list[list[int]]]]:
    """Amax `[linears, 3]` and counts `[linears, 3, 3]` of the update, over `groups`. Zeros where nothing was recorded."""
    amax = torch.zeros(len(linears), len(KINDS), device=device)
    counts = torch.zeros(len(linears), len(KINDS), 3, dtype=torch.int64, device=device)
    for index, linear in enumerate(linears):
        for column, kind in enumerate(KINDS):
            taken = linear.fp8_state.tensors[kind].take()
            if taken:
                amax[index, column], counts[index, column] = taken
    if linears:
        for group in groups:
            all_reduce(amax, ReduceOp.MAX, group=group)
            all_reduce(counts, group=group)
    return amax.tolist(), counts.tolist()


def _dense_groups() -> list[Any]:
    """Groups whose ranks have the same linear layers, or parts of them."""
    return [
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ]


def _expert_groups() -> list[Any]:
    return [parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_data_parallel_group()]


def sharded_states(weights: dict[str, Any], saved: Collection[str]) -> dict[str, Any]:
    """All states in `weights`, the model's sharded state dict by chunk. Of every layer: Megatron-Core loads all parts or none.

    `saved`: keys of the checkpoint. Those of MoE and MLA had no state of some norms once.
    """
    return {
        name: {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, ShardedObject) and "._extra_state" in key and entry.unique_key in saved
        }
        for name, entries in weights.items()
    }


def restore_states(model: list[DistributedDataParallel], loaded: dict[str, Any], recipe: Fp8Recipe) -> None:
    """Take what was loaded for `sharded_states`. A run without FP8 saved None: histories start anew."""
    for entries, chunk in zip(loaded.values(), model, strict=True):
        for name, module in chunk.module.named_modules():
            if isinstance(module, Fp8Linear):
                module.set_extra_state(entries[f"{name}._extra_state"])
        if recipe.name == "delayed":  # the other recipes of TransformerEngine have no state
            te_fp8.restore(chunk.module, entries)


def announce_switch(before: str | None, now: Fp8Recipe | None, *, by_te: bool) -> None:
    """Log that a run is resumed in another precision.

    Args:
        before: the manifest's `fp8`, None without FP8.
        now: recipe.
        by_te: TransformerEngine computes it.
    """
    if before == (str(now) if now else None):
        return
    log(
        f"precision   {f'fp8 ({now})' if now else 'bf16'}, was {f'fp8 ({before})' if before else 'bf16'} before this update"
    )
    if now and now.name == "delayed":
        first = "TransformerEngine's scales start at 1" if by_te else "the first update scales by its own amax"
        log(f"fp8         without amax histories {first}")
