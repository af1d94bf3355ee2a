"""Balance of MoE: the load of experts and the balancing loss of an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from shared.architecture.architecture import Architecture
from shared.model.router import Router
from shared.training.config import TrainingConfig

_LOSSES = {"batch": "moe_load_balancing_loss", "sequence": "moe_seq_load_balancing_loss"}


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Of one update, over all MoE layers that ran, those of MTP included. Padding is left out."""

    load: float  # tokens of a layer's fullest expert / mean over its experts; mean over layers
    highest_load: float  # of the layer where it is highest
    loss_name: str
    loss: float | None  # without coefficient, mean over layers and micro batches; None without a balancing loss

    def row(self) -> dict[str, float]:
        """For metrics.jsonl; `moe_` is drawn in the report."""
        loss = {} if self.loss is None else {self.loss_name: self.loss}
        return {**loss, "moe_expert_load": self.load, "moe_highest_expert_load": self.highest_load}

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"balance {self.loss:.4f}  "
        return f"{loss}load {self.load:.2f}"


def loss_over_micro_batch(architecture: Architecture) -> bool:
    """Whether the balancing loss is over all tokens of a micro batch: then `micro_batch_size` changes the result."""
    moe = architecture.moe
    return bool(moe and moe.auxiliary_loss and moe.auxiliary_loss_over == "batch")


def take_balance(config: TrainingConfig, model: list[DistributedDataParallel], device: torch.device) -> Balance | None:
    """The balance of the micro batches since the last call, over all ranks; None without MoE. Every rank calls this."""
    architecture: Architecture = model[0].module.architecture
    moe = architecture.moe
    if moe is None:
        return None
    table = torch.zeros(
        architecture.num_layers + architecture.mtp_depth, moe.experts + 1, dtype=torch.float64, device=device
    )
    for router in (each for chunk in model for each in chunk.modules() if isinstance(each, Router)):
        taken = router.take_statistics()
        if taken is not None:
            table[_layer(router, architecture)] = taken
    # A layer is on one pipeline stage; tensor-, context- and data-parallel ranks have different tokens each.
    torch.distributed.all_reduce(table)
    table = table.cpu()  # one copy: what follows depends on the numbers
    tokens, losses = table[:, :-1], table[:, -1]
    ran = tokens.sum(1) > 0
    if not ran.any():  # a batch of padding only, and in a rehearsal, whose kernels compute nothing
        return None
    loads = tokens[ran].amax(1) / tokens[ran].mean(1)
    micro_batches = config.global_batch_size // config.micro_batch_size  # of all data-parallel ranks
    mean, highest, loss = torch.stack([loads.mean(), loads.max(), losses[ran].mean() / micro_batches]).tolist()
    return Balance(
        load=mean,
        highest_load=highest,
        loss_name=_LOSSES[moe.auxiliary_loss_over],
        loss=loss if moe.auxiliary_loss else None,
    )


def _layer(router: Any, architecture: Architecture) -> int:
    """Index of a router's layer; MTP layers follow the decoder's."""
    index: int = router.layer_number - 1
    return index + architecture.num_layers if router.is_mtp_layer else index
