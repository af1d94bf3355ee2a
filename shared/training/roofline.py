"""Time of an update by the roofline: what a rehearsal counted, divided by what a GPU and its links can do.

An estimate that ranks layouts. It was not compared with a GPU. `speed.Speed.lines` says every assumption.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.rehearsal.collectives import Operation
from shared.rehearsal.launch_map import TITLES, Nodes
from shared.rehearsal.speed import LINK_SHARE, Speed
from shared.training.config import TrainingConfig
from shared.training.rehearsal_report import TRAINING, UPDATES, Played

_TRAINING = f"{TRAINING} of update {UPDATES}"
_OPTIMIZER = f"optimizer of update {UPDATES}"
_HIDDEN = ("DP", "EDP")  # gradients and weights, which --overlap hides
_TWICE = {"allreduce_", "allreduce_coalesced_"}  # a reduce-scatter and an all-gather


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds of a pipeline stage."""

    compute: float  # of a micro batch
    links: Mapping[str, float]  # of a micro batch, by kind of group
    data: float  # reducing gradients and gathering weights, an update
    optimizer: float  # an update

    @property
    def micro_batch(self) -> float:
        """Of one, computation and communication."""
        return self.compute + sum(self.links.values())


@dataclass(frozen=True, kw_only=True)
class Update:
    """Seconds of an update, by what they are spent on."""

    compute: float  # of the slowest stage, all micro batches
    links: Mapping[str, float]
    bubble: float
    data: float  # what is not hidden
    optimizer: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.compute + sum(self.links.values()) + self.bubble + self.data + self.optimizer


def stage_time(played: Played, micro_batches: int, speed: Speed, nodes: Nodes) -> Stage:
    """Of a rank that was played with its work counted. `micro_batches`: that were played in an update."""
    links: dict[str, float] = defaultdict(float)
    data = optimizer = 0.0
    for each in played.operations:
        if each.phase not in (_TRAINING, _OPTIMIZER):
            continue
        title, seconds = TITLES.get(each.group, "other"), operation_time(each, speed, nodes)
        if title in _HIDDEN:
            data += seconds
        elif each.phase == _OPTIMIZER or title == "other":
            optimizer += seconds
        else:
            links[title] += seconds / micro_batches
    work = played.work
    return Stage(
        compute=work[_TRAINING].seconds / micro_batches if _TRAINING in work else 0.0,
        links=dict(links),
        data=data,
        optimizer=optimizer + (work[_OPTIMIZER].seconds if _OPTIMIZER in work else 0.0),
    )


def operation_time(each: Operation, speed: Speed, nodes: Nodes) -> float:
    """Seconds of a communication. Of `n` ranks each gives and takes (n - 1) / n of the bytes, by rings; of an all-to-all what it
    sends to others. Between nodes every GPU uses the adapter of its own."""
    n, local = len(each.members), nodes.together(each.members)
    crosses = nodes.crosses(each.members)
    if each.kind == "alltoall_base_":
        within = each.moved * (local - 1) / n / speed.link
        return max(within, each.moved * (n - local) / n / speed.network if crosses else 0.0) / LINK_SHARE
    if each.kind in ("send", "recv_"):
        return each.moved / (speed.network if crosses else speed.link) / LINK_SHARE
    rate = min(speed.link, local * speed.network) if crosses else speed.link
    times = 2 if each.kind in _TWICE else 1
    return times * each.moved * (n - 1) / n / rate / LINK_SHARE


def update_time(stages: Sequence[Stage], config: TrainingConfig) -> Update:
    """Of a pipeline with these stages: the slowest paces it."""
    slowest = max(stages, key=lambda each: each.micro_batch)
    bubble = slowest.micro_batch * (config.parallel.pipeline - 1) / config.parallel.virtual_pipeline
    # Reducing hides behind the last backward pass, gathering behind the first forward pass: together a micro batch.
    hidden = slowest.micro_batch if config.overlap else 0.0
    number = config.micro_batches
    return Update(
        compute=slowest.compute * number,
        links={title: seconds * number for title, seconds in slowest.links.items()},
        bubble=bubble,
        data=max(max(each.data for each in stages) - hidden, 0.0),
        optimizer=max(each.optimizer for each in stages),
    )
