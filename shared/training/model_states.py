"""Bytes of weights, gradients and the optimizer's state of a rank without playing it: exact, for any layout.

The parameters of each kind of layer are read from a small model of the same kinds, built once for each size of TP and ETP on a
GPU that is not there. A stage is put together of them, and its gradient buffers are laid out by the functions of the run itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from shared.architecture.architecture import Architecture, MoE
from shared.model import gpt
from shared.parallel import ParallelConfig, ranks_needed
from shared.rehearsal import fake_world
from shared.rehearsal.reexecute import LIMIT
from shared.runtime import process_groups
from shared.training import loop
from shared.training.config import TrainingConfig
from shared.training.optimizer import buffer_places
from shared.training.rehearse import UNLIMITED

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_BYTES = {"bf16": 2, "fp32": 4}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STEP = 4  # bytes of AdamW's counter, one for each parameter


class Part(NamedTuple):
    """A parameter of a rank."""

    numel: int
    trained: bool
    expert: bool  # of a routed expert
    shared_embedding: bool  # held by the first and the last stage


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters of a TP rank, in the order of the modules. Of routed experts, those of one."""

    kinds: tuple[tuple[Part, ...], ...]  # of a layer of each kind, as in `Architecture.kinds`
    before: tuple[Part, ...]  # the layers of the first of several stages
    before_last: tuple[Part, ...]  # those of the last: the embedding, for MTP
    behind: tuple[Part, ...]  # the layers of the last of several stages
    before_only: tuple[Part, ...]  # the layers of one stage that is all
    behind_only: tuple[Part, ...]


class Held(NamedTuple):
    """Bytes of a rank after an update, as `optimizer.held_bytes`."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: Held) -> Held:  # type: ignore[override]
        return Held(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        """Of all three."""
        return sum(self)


def small(architecture: Architecture) -> Architecture:
    """A model of two layers of each kind, a half for each of two stages."""
    return replace(architecture, layers=architecture.kinds * 2)


def key_of(parallel: ParallelConfig) -> tuple[int, int]:
    """What the sizes of a rank's parameters depend on, experts counted apart: TP and ETP."""
    return parallel.tensor, parallel.etp


def read_stage(config: TrainingConfig, architecture: Architecture, stages: int, stage: int) -> dict[str, list[Part]]:
    """Parameters of a stage of the small model: of `before`, `behind`, and of each kind of layer by its number as a string.

    In a process that has just been forked, with the stubs of a CUDA runtime.
    """
    given = config.parallel
    needed = ranks_needed(tensor=given.tensor, pipeline=stages, expert=1, expert_tensor=given.etp)
    parallel = ParallelConfig(
        processes=needed,
        tensor=given.tensor,
        pipeline=stages,
        sequence_parallel=given.sequence_parallel,
        expert_tensor=given.etp,
    )
    config = replace(config, parallel=parallel, global_batch_size=config.micro_batch_size * parallel.data)
    os.environ[LIMIT] = str(UNLIMITED)
    fake_world.join(stage * needed // stages, needed)
    process_groups.initialize(parallel, config.seed)
    model = small(architecture)
    backend, _ = loop.backend_of(config, model)
    chunks = gpt.build(model, parallel, dtype=loop.model_dtype(config), backend=backend, **loop.model_overrides(config))
    loop.trainable_of(config, model).apply(chunks)
    found: dict[str, list[Part]] = {}
    of_layers = False
    for name, parameter in chunks[0].named_parameters():
        expert, layer = _EXPERT.search(name), _LAYER.match(name)
        of_layers = of_layers or layer is not None
        if (expert and int(expert[1])) or (layer and int(layer[1]) >= len(architecture.kinds)):
            continue
        part = Part(
            numel=parameter.numel(),
            trained=parameter.requires_grad,
            expert=expert is not None,
            shared_embedding=getattr(parameter, "shared_embedding", False),
        )
        found.setdefault(layer[1] if layer else "behind" if of_layers else "before", []).append(part)
    return found


def join(first: dict[str, list[Part]], last: dict[str, list[Part]], only: dict[str, list[Part]]) -> Parts:
    """What `read_stage` found: of the first and the last of two stages, and of one."""
    kinds = sorted((name for name in first if name.isdigit()), key=int)
    return Parts(
        before=tuple(first.get("before", ())),
        kinds=tuple(tuple(first[name]) for name in kinds),
        before_last=tuple(last.get("before", ())),
        behind=tuple(last.get("behind", ())),
        before_only=tuple(only.get("before", ())),
        behind_only=tuple(only.get("behind", ())),
    )


class States:
    """States of any layout of a model."""

    def __init__(self, architecture: Architecture, config: TrainingConfig) -> None:
        self._architecture, self._config = architecture, config
        numbers = {kind: number for number, kind in enumerate(architecture.kinds)}
        self.layers = tuple(numbers[layer] for layer in architecture.layers)  # kind of each layer
        self._experts = [kind.mlp.experts if isinstance(kind.mlp, MoE) else 0 for kind in architecture.kinds]
        mtp = architecture.mtp
        self._mtp_experts = mtp.layer.mlp.experts if mtp and isinstance(mtp.layer.mlp, MoE) else 0
        self._held = lru_cache(maxsize=None)(self._chunk)

    def composition(self, parallel: ParallelConfig, stage: int) -> tuple[tuple[int, ...], ...]:
        """Kinds of the layers of a stage, by its chunks."""
        shares = parallel.pipeline_layers or (len(self.layers) // parallel.chunks,) * parallel.chunks
        found, first = [], 0
        for chunk, share in enumerate(shares):
            if chunk % parallel.pipeline == stage:
                found.append(self.layers[first : first + share])
            first += share
        return tuple(found)

    def of(self, parallel: ParallelConfig, parts: Parts, stage: int) -> Held:
        """Bytes that the first rank of a stage holds after an update."""
        chunks = self.composition(parallel, stage)
        total = Held()
        for index, layers in enumerate(chunks):
            first = stage == 0 and index == 0
            last = stage == parallel.pipeline - 1 and index == len(chunks) - 1
            total += self._held(
                layers,
                parts,
                first=first,
                last=last,
                one=parallel.chunks == 1,
                experts=parallel.expert,
                apart=parallel.expert > 1 or parallel.etp != parallel.tensor,
                ranks=parallel.data * parallel.context,
                expert_ranks=parallel.processes // (parallel.pipeline * parallel.expert * parallel.etp),
                buckets=stage == 0 and index == 0,
            )
        return total

    def _parameters(
        self, layers: Sequence[int], parts: Parts, *, first: bool, last: bool, one: bool, experts: int
    ) -> Iterator[Part]:
        if first:
            yield from parts.before_only if one else parts.before
        elif last:
            yield from parts.before_last
        for kind in layers:
            yield from _with_experts(parts.kinds[kind], self._experts[kind] // experts)
        if last:
            yield from _with_experts(parts.behind_only if one else parts.behind, self._mtp_experts // experts)

    def _chunk(
        self,
        layers: tuple[int, ...],
        parts: Parts,
        *,
        first: bool,
        last: bool,
        one: bool,
        experts: int,
        apart: bool,
        ranks: int,
        expert_ranks: int,
        buckets: bool,
    ) -> Held:
        given = list(self._parameters(layers, parts, first=first, last=last, one=one, experts=experts))
        width = _BYTES[self._config.precision]
        trained: dict[torch.nn.Parameter, Part] = {}
        for part in given:
            if part.trained:
                tensor = torch.empty(part.numel, dtype=_DTYPES[self._config.precision], device="meta")
                parameter = torch.nn.Parameter(tensor)
                parameter.allreduce = not (part.expert and apart)
                parameter.shared_embedding = part.shared_embedding
                trained[parameter] = part
        overlap = self._config.overlap and ranks > 1
        _, places = buffer_places(
            list(trained), ranks=ranks, expert_ranks=expert_ranks, overlap=overlap, buckets=buckets and overlap
        )
        gradients = optimizer = 0
        state = 8 if self._config.precision == "fp32" else 12  # Adam's two moments; main weights
        for layout in places.layouts.values():
            gradients += 4 * layout.bucket_indices[-1][1]
            shares = layout.num_optimizer_shards
            for start, end, bucket in layout.param_index_map.values():
                from_, to = layout.bucket_indices[bucket]
                own = min(end, from_ + (to - from_) // shares) - start  # the first rank's
                if own > 0:
                    optimizer += own * state + _STEP
        return Held(sum(part.numel for part in given) * width, gradients, optimizer)


def _with_experts(parts: Sequence[Part], count: int) -> Iterator[Part]:
    """The parameters with those of the routed experts, one after another, `count` times."""
    of_one: list[Part] = []
    for part in parts:
        if part.expert:
            of_one.append(part)
            continue
        yield from of_one * count
        of_one = []
        yield part
    yield from of_one * count
