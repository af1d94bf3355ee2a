"""Layouts that a run could have: enumerated, checked as a run checks them, and a first guess of their speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from shared.architecture.architecture import MLP, Architecture, MoE
from shared.errors import UserError
from shared.model.recompute import Recompute
from shared.parallel import ParallelConfig, ranks_needed
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.speed import LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, OPERATION_SECONDS, Speed
from shared.report.metrics import flops_per_token
from shared.training.config import TrainingConfig

TENSOR = (1, 2, 4, 8, 16)
VIRTUAL = (1, 2, 4)
CONTEXT = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")  # what costs least time first
_LARGEST_PIPELINE = 64
_LEAST_TOKENS = 2048  # of a context-parallel rank: fewer leave attention nothing to hide its exchange behind
_OPERATIONS = 150  # of a layer in a forward or backward pass, about
_TRAFFIC = 12  # bytes of a weight in a micro batch: its gradient is written, read and added up in fp32
_MOST_TOKENS = 65536  # of a micro batch on one rank


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, with what is chosen together with it."""

    config: TrainingConfig

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""
        return self.config.parallel

    @property
    def recompute(self) -> Recompute:
        """The one kind of recomputation."""
        return self.config.recompute[0]

    @cached_property
    def flags(self) -> dict[str, str]:
        """Flags of `pretrain train` that differ from their defaults; a switch has the value ""."""
        parallel = self.parallel
        given: dict[str, str | bool | None] = {
            "--tensor-parallel": str(parallel.tensor) if parallel.tensor > 1 else None,
            "--sequence-parallel": parallel.sequence_parallel,
            "--pipeline-parallel": str(parallel.pipeline) if parallel.pipeline > 1 else None,
            "--virtual-pipeline": str(parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else None,
            "--pipeline-layers": ",".join(map(str, parallel.pipeline_layers)) if parallel.pipeline_layers else None,
            "--context-parallel": str(parallel.context) if parallel.context > 1 else None,
            "--expert-parallel": str(parallel.expert) if parallel.expert > 1 else None,
            "--expert-tensor-parallel": str(parallel.etp) if parallel.etp != parallel.tensor else None,
            "--recompute": None if self.recompute == "none" else self.recompute,
            "--micro-batch-size": str(self.config.micro_batch_size),
        }
        return {flag: "" if value is True else str(value) for flag, value in given.items() if value}

    def short(self) -> str:
        """As a row of a table says it."""
        parallel = self.parallel
        sizes = {
            "TP": parallel.tensor,
            "CP": parallel.context,
            "PP": parallel.pipeline,
            "VPP": parallel.virtual_pipeline,
            "EP": parallel.expert,
        }
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if parallel.etp != parallel.tensor:
            words.append(f"ETP{parallel.etp}")
        return " ".join([*words, f"DP{parallel.data}"])


def candidates(base: TrainingConfig, architecture: Architecture, gpus: int) -> Iterator[Candidate]:
    """Every layout that `base` may have on so many GPUs: what the run's own checks pass."""
    for parallel in layouts(architecture, gpus, base.sequence_length):
        try:
            parallel.check_model(architecture)
        except UserError:
            continue
        for size in MICRO_BATCHES:
            if size > 1 and size * base.sequence_length > _MOST_TOKENS:
                break
            for recompute in RECOMPUTE:
                try:
                    config = replace(base, parallel=parallel, micro_batch_size=size, recompute=(recompute,))
                except UserError:  # the batch does not divide
                    break
                yield Candidate(config=config)


def layouts(architecture: Architecture, gpus: int, sequence_length: int) -> Iterator[ParallelConfig]:
    """Combinations of parallel sizes on so many GPUs, not yet checked against the model."""
    experts = architecture.moe.experts if architecture.moe else 1
    spread = [size for size in range(1, experts + 1) if experts % size == 0 and gpus % size == 0]
    pipelines = [
        size for size in range(1, min(architecture.num_layers, _LARGEST_PIPELINE, gpus) + 1) if gpus % size == 0
    ]
    for tensor in TENSOR:
        for context in CONTEXT:
            if context > 1 and sequence_length // context < _LEAST_TOKENS:
                break
            for pipeline in pipelines:
                if gpus % (tensor * context * pipeline):
                    continue
                for expert in spread:
                    for expert_tensor in {1, tensor} if architecture.moe else {tensor}:
                        if gpus % ranks_needed(
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            expert=expert,
                            expert_tensor=expert_tensor,
                        ):
                            continue
                        for virtual in VIRTUAL if pipeline > 1 else (1,):
                            for layers in shares(architecture, pipeline, virtual):
                                yield ParallelConfig(
                                    processes=gpus,
                                    tensor=tensor,
                                    pipeline=pipeline,
                                    virtual_pipeline=virtual,
                                    pipeline_layers=layers,
                                    sequence_parallel=tensor > 1,
                                    context=context,
                                    expert=expert,
                                    expert_tensor=None if expert_tensor == tensor else expert_tensor,
                                )


def shares(architecture: Architecture, pipeline: int, virtual: int) -> list[tuple[int, ...] | None]:
    """Layers of the model chunks: equal shares (None) where they divide; and shares with which the last stage, with output layer
    and MTP layers, has as much to compute as others."""
    count, chunks = architecture.num_layers, pipeline * virtual
    if pipeline == 1:
        return [None]
    if chunks > count:
        return []
    found: list[tuple[int, ...] | None] = [] if count % chunks else [None]
    behind = round(head_in_layers(architecture))
    share = -(-(count + behind) // chunks)
    layers = [share] * chunks
    layers[-1] -= min(behind, share - 1)
    surplus = sum(layers) - count
    # The first stages keep the activations of most micro batches.
    for index in range(surplus):
        layers[index % (chunks - 1)] -= 1
    if min(layers) >= 1 and sum(layers) == count and len(set(layers)) > 1:
        found.append(tuple(layers))
    return found


def head_in_layers(architecture: Architecture) -> float:
    """Time of the output layer and of MTP layers, in that of the last layer."""
    hidden = architecture.hidden_size
    layer = architecture.layers[-1].parameter_count(hidden, active=True)
    head = architecture.vocab_size * hidden
    depth = architecture.mtp_depth
    return (head * (1 + depth)) / layer + depth


@dataclass(frozen=True)
class Sizes:
    """What a guess needs of a model, computed once."""

    layers: int
    hidden: int
    head: float  # in layers
    flops: float  # of a token, forward and backward
    dense: int  # parameters
    experts: int  # parameters of routed experts
    routed: float  # share of the layers
    top_k: int
    keys: int  # of keys and values of a token in a layer
    kept: float  # numbers that a layer keeps of a token, about
    vocabulary: int

    @classmethod
    def of(cls, architecture: Architecture, sequence_length: int) -> Sizes:
        """Of a model; `sequence_length` in tokens."""
        hidden = architecture.hidden_size
        moes = [layer.mlp for layer in architecture.layers if isinstance(layer.mlp, MoE)]
        experts = sum(mlp.experts * mlp.expert.parameter_count(hidden) for mlp in moes)
        layer = architecture.layers[-1]
        mixer = architecture.attention
        active = layer.mlp.expert.ffn_hidden_size * layer.mlp.top_k if isinstance(layer.mlp, MoE) else 0
        wide = active or (layer.mlp.ffn_hidden_size if isinstance(layer.mlp, MLP) else 0)
        return cls(
            layers=architecture.num_layers,
            hidden=hidden,
            head=head_in_layers(architecture),
            flops=flops_per_token(architecture, sequence_length, mtp=True),
            dense=architecture.parameter_count() - experts,
            experts=experts,
            routed=len(moes) / architecture.num_layers,
            top_k=moes[0].top_k if moes else 0,
            keys=2 * mixer.groups * mixer.head_dim,
            kept=8 * hidden + 3 * mixer.heads * mixer.head_dim + 4 * wide + (4 * hidden * moes[0].top_k if moes else 0),
            vocabulary=architecture.vocab_size,
        )


def least_states(sizes: Sizes, config: TrainingConfig) -> float:
    """Bytes that the stages of a layout have on average, at least: weights, and if they are trained fp32 gradients and a share of
    the optimizer's state."""
    parallel, width = config.parallel, 2 if config.precision == "bf16" else 4
    dense = sizes.dense / (parallel.tensor * parallel.pipeline)
    sparse = sizes.experts / (parallel.etp * parallel.expert * parallel.pipeline)
    if config.lora is not None:
        return (dense + sparse) * width
    expert_data = parallel.processes / (parallel.pipeline * parallel.expert * parallel.etp)
    each, main = width + 4, 12 if width == 2 else 8
    return dense * (each + main / (parallel.data * parallel.context)) + sparse * (each + main / expert_data)


def guessed_bytes(sizes: Sizes, candidate: Candidate) -> float:
    """Memory of a rank of the first stage, roughly: for the order alone."""
    config, parallel = candidate.config, candidate.parallel
    tokens = config.micro_batch_size * config.sequence_length / parallel.context
    full = candidate.recompute == "full"
    each = tokens / parallel.tensor * 2
    layers = sizes.layers / parallel.pipeline
    flight = min(parallel.pipeline, config.micro_batches)
    interleaved = (
        1 + (parallel.pipeline - 1) / (flight * parallel.virtual_pipeline) if parallel.virtual_pipeline > 1 else 1.0
    )
    kept = each * layers * (sizes.hidden if full else sizes.kept) * flight * interleaved
    logits = 12 * tokens * sizes.vocabulary / parallel.tensor if parallel.pipeline == 1 else 0.0
    return least_states(sizes, config) + kept + max(logits, each * sizes.kept)


def guess(sizes: Sizes, candidate: Candidate, speed: Speed, nodes: Nodes) -> float:
    """Seconds of an update, roughly: for the order in which candidates are rehearsed, which says them better.

    FLOPs of PaLM's appendix B (arXiv:2204.02311), communication of the layers by its volume, the bubble of the pipeline.
    """
    config, parallel = candidate.config, candidate.parallel
    tokens = config.micro_batch_size * config.sequence_length / parallel.context
    shares = parallel.stage_layers(sizes.layers)
    slowest = max(*shares, shares[-1] + sizes.head) / (sizes.layers + sizes.head)
    passes = 3 if candidate.recompute == "full" else 2
    again = 4 / 3 if candidate.recompute == "full" else 1.02 if candidate.recompute == "selective" else 1.0
    layers = max(shares)
    compute = max(
        sizes.flops * tokens / parallel.tensor * slowest * again / (MATRIX_SHARE * speed.matrix),
        layers * _OPERATIONS * passes * OPERATION_SECONDS,
    )
    held = (sizes.dense / parallel.tensor + sizes.experts / (parallel.etp * parallel.expert)) / parallel.pipeline
    compute += held * _TRAFFIC / (MEMORY_SHARE * speed.memory)
    state = tokens * sizes.hidden * 2 / parallel.tensor  # bytes of a layer's input on a rank

    def rate(ranks: int, step: int) -> float:
        members = range(0, ranks * step, step)
        crosses = nodes.crosses(members)
        return LINK_SHARE * (min(speed.link, nodes.together(members) * speed.network) if crosses else speed.link)

    links = 0.0
    if parallel.tensor > 1:
        links += layers * 4 * passes * state * (parallel.tensor - 1) / rate(parallel.tensor, 1)
    if parallel.context > 1:
        keys = tokens * 2 * sizes.keys / parallel.tensor
        links += layers * passes * keys * (parallel.context - 1) / rate(parallel.context, parallel.tensor)
    if parallel.expert > 1:
        members = range(0, parallel.expert * parallel.etp, parallel.etp)
        outside = 1 - nodes.together(members) / parallel.expert
        rows = state * sizes.top_k * parallel.etp
        links += layers * sizes.routed * 2 * passes * rows * max(outside / speed.network, 1 / speed.link) / LINK_SHARE
    if parallel.pipeline > 1:
        links += 4 * state * parallel.virtual_pipeline / (LINK_SHARE * speed.network)
    each = compute + links
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline
    exposed = max(6 * held / (LINK_SHARE * speed.network) - each, 0.0) if config.lora is None else 0.0
    return each * (config.micro_batches + bubble) + exposed
