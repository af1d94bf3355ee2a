"""Bytes of a rank's weights, gradients and optimizer state, by arithmetic on the model's tensor table. Imports no torch.

They are what stays allocated between updates. Activations come on top: `--rehearse` says how many.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.mapping.adapters import AdaptedLinear, adapted_linears
from shared.mapping.rule import Rule
from shared.parallel import ParallelConfig
from shared.training.config import TrainingConfig

_WIDTH = {"bf16": 2, "fp32": 4}
_GRADIENT, _MOMENTS, _MAIN = 4, 8, 4  # bytes of a trained number: fp32; fp32 weights are their own main copy
_START, _END = 64, 128  # numbers that Megatron-Core pads to in a buffer of gradients: a tensor's start, a buffer's end

# Tensors that TP cuts; all others are on each of its ranks. Of a row-parallel layer, the weight only.
_COLUMN = r"linear_(qkv|q_proj|q_up_proj|kv_up_proj|q_down_proj|kv_down_proj|fc1)\.(weight|bias)"
_ROW_PARALLEL = ("linear_proj", "linear_fc2", "out_proj")
_ROW = rf"({'|'.join(_ROW_PARALLEL)})\.weight"
_DELTA_NET = r"in_proj\.weight\.\w+|conv1d\.weight\.\w+|A_log|dt_bias"
_ENDS = r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)|eh_proj\.weight"
_CUT = re.compile(rf"(.*\.)?({_COLUMN}|{_ROW}|{_DELTA_NET}|{_ENDS}|softmax_offset)")
_VOCABULARY = re.compile(r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)")
_TIED = "embedding.word_embeddings.weight"
_BUFFERS = ".router.expert_bias"  # not a parameter


@dataclass(frozen=True, kw_only=True)
class States:
    """Of one rank. Bytes."""

    weights: int
    trained_weights: int  # of them
    gradients: int  # the buffers, in fp32
    optimizer: int  # AdamW's moments and, in bf16, fp32 main weights: this rank's share of its data-parallel group's
    on_host: int  # the moments, with --offload-optimizer; not in `optimizer` then

    @property
    def total(self) -> int:
        """All on the device."""
        return self.weights + self.gradients + self.optimizer


class _Tensor(NamedTuple):
    """On one rank, and so many of the kind: experts of a layer."""

    numbers: int
    expert: bool
    trained: bool
    copies: int = 1


def of_stages(config: TrainingConfig, architecture: Architecture) -> tuple[States, ...]:
    """Of a rank of each pipeline stage. All ranks of a stage have as much.

    Exact for one data-parallel rank. With more, a rank has at most these: what Megatron-Core pads buckets by is shared out
    too, fewer than 128 numbers for each data-parallel rank and bucket.
    """
    stages: defaultdict[int, list[_Tensor]] = defaultdict(list)
    for stage, tensor in _tensors(config, architecture):
        stages[stage].append(tensor)
    return tuple(_states(stages[stage], config) for stage in range(config.parallel.pipeline))


def fullest(config: TrainingConfig, architecture: Architecture) -> States:
    """Of the stage with the most."""
    return max(of_stages(config, architecture), key=lambda each: each.total)


def _states(tensors: list[_Tensor], config: TrainingConfig) -> States:
    parallel, width = config.parallel, _WIDTH[config.precision]
    main = _MAIN if config.precision == "bf16" else 0
    gradients = trained_numbers = 0
    for expert in (False, True):
        ranks = expert_replicas(parallel) if expert else parallel.data * parallel.context
        trained = [each for each in tensors if each.trained and each.expert == expert]
        if trained:
            buffer = _up(sum(each.copies * _up(each.numbers, _START) for each in trained), math.lcm(ranks, _END))
            gradients += _GRADIENT * buffer
            trained_numbers += _numbers(trained) if ranks == 1 else buffer // ranks
    moments = _MOMENTS * trained_numbers
    return States(
        weights=width * _numbers(tensors),
        trained_weights=width * _numbers([each for each in tensors if each.trained]),
        gradients=gradients,
        optimizer=main * trained_numbers + (0 if config.offload_optimizer else moments),
        on_host=moments if config.offload_optimizer else 0,
    )


def _numbers(tensors: list[_Tensor]) -> int:
    return sum(each.copies * each.numbers for each in tensors)


def expert_replicas(parallel: ParallelConfig) -> int:
    """Ranks that have the same experts."""
    return parallel.processes // (parallel.pipeline * parallel.expert * parallel.etp)


def _up(numbers: int, unit: int) -> int:
    return -(-numbers // unit) * unit


def _tensors(config: TrainingConfig, architecture: Architecture) -> Iterator[tuple[int, _Tensor]]:
    """The pipeline stage of every tensor of a rank, and the tensor."""
    parallel, whole = config.parallel, config.lora is None
    table, by_layer = registry.table_of(architecture), _stage_of_layers(parallel, architecture.num_layers)
    for rule in table.rules:
        if rule.megatron.endswith(_BUFFERS):
            continue
        expert = "expert" in rule.axes
        trained = whole and (bool(config.mtp_loss_scaling_factor) or not rule.megatron.startswith("mtp."))
        count = table.sizes["expert"] // parallel.expert if expert else 1
        tensor = _Tensor(_on_a_rank(rule, architecture, parallel), expert, trained, count)
        for stage in _stages(rule, by_layer, architecture):
            yield stage, tensor
    if config.lora is not None:
        for linear in adapted_linears(table, config.lora.targets).values():
            stage, expert = by_layer[int(linear.module.split(".")[2])], ".experts.experts." in linear.module
            if not expert or int(linear.module.split(".")[6]) < table.sizes["expert"] // parallel.expert:
                for numbers in _adapters(linear, config.lora.rank, parallel.etp if expert else parallel.tensor):
                    yield stage, _Tensor(numbers, expert, True)


def _stage_of_layers(parallel: ParallelConfig, layers: int) -> list[int]:
    """The pipeline stage of each decoder layer."""
    chunks = parallel.pipeline_layers or (layers // parallel.chunks,) * parallel.chunks
    return [chunk % parallel.pipeline for chunk, number in enumerate(chunks) for _ in range(number)]


def _stages(rule: Rule, by_layer: Sequence[int], architecture: Architecture) -> Iterator[int]:
    """The stages that have a rule's tensor; one several times that has several."""
    last = by_layer[-1]
    if found := re.match(r"decoder\.layers\.(\d+)\.", rule.megatron):
        yield by_layer[int(found[1])]
    elif "layer" in rule.axes:
        yield from (by_layer[layer] for layer in (range(len(by_layer)) if rule.layers is None else rule.layers))
    elif rule.megatron.startswith("embedding."):
        yield 0
        # MTP layers look tokens up, and a tied head is the same matrix.
        if last and (architecture.mtp or (architecture.head.tied and rule.megatron == _TIED)):
            yield last
    else:
        yield last


def _on_a_rank(rule: Rule, architecture: Architecture, parallel: ParallelConfig) -> int:
    """Numbers of one tensor of a rule on a rank of one layer and expert."""
    shape = rule.layout.target_shape([source.shape for source in rule.sources])
    if _VOCABULARY.fullmatch(rule.megatron):
        shape = (architecture.padded_vocab_size(parallel.tensor), *shape[1:])
    heads = math.prod(registry.table_of(architecture).sizes[axis] for axis in rule.axes if axis.endswith("_head"))
    cut = _CUT.fullmatch(rule.megatron) or any(axis.endswith("_head") for axis in rule.axes)
    ranks = parallel.etp if "expert" in rule.axes else parallel.tensor
    return math.prod(shape) * heads // (ranks if cut else 1)


def _adapters(linear: AdaptedLinear, rank: int, ranks: int) -> tuple[int, int]:
    """Numbers of A and of B on a rank: a column-parallel layer's B is cut, and a row-parallel one's A."""
    a = len(linear.matrices) * rank * linear.columns
    b = rank * sum(piece.adapted_rows for piece in linear.pieces)
    row = linear.module.rpartition(".")[2] in _ROW_PARALLEL
    return (a // ranks, b) if row else (a, b // ranks)
