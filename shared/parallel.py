"""The parallel layout of a run, and its rules. Imports no torch.

TP tensor, PP pipeline, VPP virtual pipeline, SP sequence, CP context, EP expert, ETP expert tensor, DP data parallelism.
Three checks, each as early as possible: `ParallelConfig(...)` by itself, `check_model` against the model, `check_batch`
against the batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from shared.architecture.architecture import MLP, Architecture, Attention, GatedDeltaNet, LatentAttention, Layer, MoE
from shared.errors import UserError

ContextExchange = Literal["gather", "heads"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel sizes, in ranks. UserError if they contradict each other."""

    processes: int = 1
    """World size."""
    tensor: int = 1
    """Tensor parallel size (TP)."""
    pipeline: int = 1
    """Pipeline parallel size (PP)."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (VPP); above 1 the schedule is interleaved."""
    pipeline_layers: tuple[int, ...] | None = None
    """Decoder layers of each of the PP x VPP model chunks, in the order of the layers; None: equal shares. The embedding is in
    the first chunk, MTP layers and the output layer are in the last."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the TP ranks (SP)."""
    context: int = 1
    """Context parallel size (CP)."""
    context_exchange: ContextExchange = "gather"
    """What attention exchanges over the CP ranks: all keys and values, or heads (`shared.model.context_parallel`)."""
    expert: int = 1
    """Expert parallel size (EP)."""
    expert_tensor: int | None = None
    """Expert tensor parallel size (ETP); None: `tensor`."""

    def __post_init__(self) -> None:
        for flag, size in (
            ("--processes", self.processes),
            ("--tensor-parallel", self.tensor),
            ("--pipeline-parallel", self.pipeline),
            ("--virtual-pipeline", self.virtual_pipeline),
            ("--context-parallel", self.context),
            ("--expert-parallel", self.expert),
            ("--expert-tensor-parallel", self.etp),
        ):
            if size < 1:
                raise UserError(f"{flag} must be at least 1, not {size}")
        if self.context == 1 and self.context_exchange != "gather":
            raise UserError(f"--context-parallel-exchange {self.context_exchange} needs --context-parallel 2 or more")
        if self.sequence_parallel and self.tensor == 1:
            raise UserError("--sequence-parallel needs --tensor-parallel 2 or more")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError(
                f"--virtual-pipeline {self.virtual_pipeline} needs --pipeline-parallel 2 or more, or give --virtual-pipeline 1"
            )
        if self.pipeline_layers is not None:
            self._check_pipeline_layers(self.pipeline_layers)
        needed = ranks_needed(
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
        )
        if self.processes % needed:
            context = f" x --context-parallel {self.context}" if self.context > 1 else ""
            experts = f" and of {self._expert_flags()}" if needed != self.model_parallel else ""
            raise UserError(
                f"--processes {self.processes} is not a multiple of --tensor-parallel {self.tensor} x --pipeline-parallel "
                f"{self.pipeline}{context}{experts}; give --processes {max(self.processes // needed, 1) * needed}"
            )

    def _check_pipeline_layers(self, layers: tuple[int, ...]) -> None:
        given = f"--pipeline-layers {_numbers(layers)}"
        if self.pipeline == 1:
            raise UserError(f"{given} needs --pipeline-parallel 2 or more")
        if len(layers) != self.chunks:
            chunks = f"--pipeline-parallel {self.pipeline}"
            if self.virtual_pipeline > 1:
                chunks += f" x --virtual-pipeline {self.virtual_pipeline}"
            raise UserError(
                f"{given} has {len(layers)} number{'s' * (len(layers) > 1)}; give {self.chunks}, the layers of each of "
                f"{chunks} model chunks"
            )
        if min(layers) < 1:
            raise UserError(f"{given}: every model chunk needs a layer; give numbers of at least 1")

    @property
    def chunks(self) -> int:
        """Model chunks of a replica: PP x VPP."""
        return self.pipeline * self.virtual_pipeline

    def stage_layers(self, num_layers: int) -> tuple[float, ...]:
        """Decoder layers of each pipeline rank, over all its chunks, of a model of `num_layers`."""
        if self.pipeline_layers is None:
            return (num_layers / self.pipeline,) * self.pipeline
        return tuple(sum(self.pipeline_layers[rank :: self.pipeline]) for rank in range(self.pipeline))

    @property
    def etp(self) -> int:
        """Expert tensor parallel size (ETP)."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def model_parallel(self) -> int:
        """Ranks of one model replica: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data parallel size (DP): number of model replicas."""
        return self.processes // self.model_parallel

    def check_model(self, architecture: Architecture) -> None:
        """Check the layout against the model. UserError suggests a flag and a valid value."""
        violation = next(self._violations(architecture), None)
        if violation:
            raise UserError(f"{violation.message}; give {self._fitting(violation.field, architecture)}")

    def check_batch(self, *, sequence_length: int, micro_batch_size: int, global_batch_size: int) -> None:
        """Check the layout against the batch sizes. UserError suggests a valid value.

        Args:
            sequence_length: tokens.
            micro_batch_size: sequences per forward pass of one data-parallel rank.
            global_batch_size: sequences per update.
        """
        self._check_length(sequence_length)
        share = micro_batch_size * self.data
        if global_batch_size % share:
            raise UserError(
                f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size "
                f"{micro_batch_size} x {self.data} data-parallel ranks; "
                f"give --global-batch-size {-(-global_batch_size // share) * share}"
            )
        micro_batches = global_batch_size // share
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline:
            wanted = -(-micro_batches // self.pipeline) * self.pipeline
            raise UserError(
                f"--virtual-pipeline needs a number of micro batches per update ({micro_batches}) that is a multiple of "
                f"--pipeline-parallel {self.pipeline}; give --global-batch-size {wanted * share}"
            )

    def _check_length(self, length: int) -> None:
        """CP splits a sequence into 2 x CP equal chunks, SP a CP rank's part over the TP ranks."""
        shards = self.tensor if self.sequence_parallel else 1
        unit, needs = shards, f"--sequence-parallel needs sequences of a multiple of --tensor-parallel {shards} tokens"
        if self.context > 1:
            unit = self.context * math.lcm(2, shards)
            beside = f" with --sequence-parallel over {shards} ranks" if shards > 1 else ""
            needs = f"--context-parallel {self.context}{beside} needs sequences of a multiple of {unit} tokens"
        if length % unit:
            raise UserError(f"{needs}, not {length}; give --sequence-length {-(-length // unit) * unit}")

    def __str__(self) -> str:
        sizes = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual": self.virtual_pipeline,
            "context": self.context,
            "expert": self.expert,
            "data": self.data,
        }
        notes = {"context": " by heads" if self.context_exchange == "heads" else ""}
        if self.pipeline_layers is not None:
            notes["pipeline"] = f" of {_numbers(self.pipeline_layers)} layers"
        return " x ".join(f"{name} {size}{notes.get(name, '')}" for name, size in sizes.items() if size > 1)

    def _expert_flags(self) -> str:
        return (
            f"--expert-tensor-parallel {self.etp} x --expert-parallel {self.expert} x "
            f"--pipeline-parallel {self.pipeline}"
        )

    def _violations(self, architecture: Architecture) -> Iterator[Violation]:
        for rule in MODEL_RULES:
            yield from rule(self, architecture)

    def _fitting(self, field: str, architecture: Architecture) -> str:
        """The flag of `field` with the largest valid value up to the current one."""
        if field == "sequence_parallel":
            return "--sequence-parallel"
        if field == "context_exchange":
            return "--context-parallel-exchange gather"
        if field == "pipeline_layers":
            return self._even_pipeline_layers(architecture.num_layers) or "a smaller --pipeline-parallel"
        world = self.model_parallel * self.etp * self.expert
        size = getattr(self, field)
        while size > 1:
            sizes: dict[str, Any] = {field: size, "processes": size * world}  # divisible by the changed layout
            other = replace(self, **sizes)
            if all(violation.field != field for violation in other._violations(architecture)):
                break
            size -= 1
        wanted = f"{_FLAGS[field]} {size}"
        if size == 1 and field == "tensor" and self.sequence_parallel:
            wanted += " without --sequence-parallel"
        if size == 1 and field == "pipeline" and self.virtual_pipeline > 1:
            wanted += " and --virtual-pipeline 1"
        if field in ("pipeline", "virtual_pipeline") and (
            uneven := self._even_pipeline_layers(architecture.num_layers)
        ):
            wanted += f", or {uneven}"
        return wanted

    def _even_pipeline_layers(self, num_layers: int) -> str | None:
        """The flag of shares that are as even as possible, the smaller last: the output layer is there. None: too few layers."""
        share, more = divmod(num_layers, self.chunks)
        layers = (share + 1,) * more + (share,) * (self.chunks - more)
        return f"--pipeline-layers {_numbers(layers)}" if share else None


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def ranks_needed(*, tensor: int, pipeline: int, context: int = 1, expert: int, expert_tensor: int | None) -> int:
    """The number of ranks that the world size is a multiple of: whole replicas of dense layers and of experts."""
    return math.lcm(tensor * context * pipeline, (expert_tensor or tensor) * expert * pipeline)


_FLAGS = {
    "tensor": "--tensor-parallel",
    "pipeline": "--pipeline-parallel",
    "virtual_pipeline": "--virtual-pipeline",
    "context": "--context-parallel",
    "context_exchange": "--context-parallel-exchange",
    "expert": "--expert-parallel",
    "expert_tensor": "--expert-tensor-parallel",
}


@dataclass(frozen=True)
class Violation:
    """A violated rule."""

    field: str
    """The field of `ParallelConfig` to change."""
    message: str


type Rule = Callable[[ParallelConfig, Architecture], Iterator[Violation]]


def _attention(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """TP divides the query heads. TP divides the key/value heads, or is their multiple: Megatron-Core gathers split heads."""
    for attention in _mixers(architecture, Attention):
        yield from _divides(parallel, "attention heads", attention.heads)
        groups = attention.groups
        if groups % parallel.tensor and parallel.tensor % groups:
            yield Violation(
                "tensor",
                f"--tensor-parallel {parallel.tensor} neither divides nor is a multiple of the model's {groups} "
                "key/value heads",
            )


def _mla(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """TP divides heads and rows of the down-projections. Their norms' gradients are all-reduced over TP only under SP."""
    for mla in _mixers(architecture, LatentAttention):
        yield from _divides(parallel, "attention heads", mla.heads)
        yield from _divides(parallel, "rows of MLA's q_a_proj", mla.q_lora_rank or 0)
        yield from _divides(parallel, "rows of MLA's kv_a_proj", mla.kv_lora_rank + mla.qk_rope_head_dim)
        yield from _needs_sequence_parallel(parallel, "MLA")


def _delta_net(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """TP divides the key heads, and so the value heads. The norm's gradient is all-reduced over TP only under SP."""
    for net in _mixers(architecture, GatedDeltaNet):
        yield from _divides(parallel, "key heads of gated delta nets", net.key_heads)
        yield from _needs_sequence_parallel(parallel, "a gated delta net")


def _mlp(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    for layer in _kinds(architecture):
        if isinstance(layer.mlp, MLP):
            yield from _divides(parallel, "rows of an MLP's up_proj", layer.mlp.ffn_hidden_size)


def _moe(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """EP divides the experts, ETP the rows of an expert's up_proj, TP those of the shared experts."""
    layers = [layer.mlp for layer in _kinds(architecture) if isinstance(layer.mlp, MoE)]
    if not layers and parallel.expert > 1:
        yield Violation("expert", f"--expert-parallel {parallel.expert} is for MoE, and the model has no experts")
    for moe in layers:
        if moe.experts % parallel.expert:
            yield Violation(
                "expert", f"--expert-parallel {parallel.expert} does not divide the model's {moe.experts} experts"
            )
        rows = moe.expert.ffn_hidden_size
        if rows % parallel.etp:
            field = "tensor" if parallel.expert_tensor is None else "expert_tensor"
            yield Violation(
                field, f"{_FLAGS[field]} {parallel.etp} does not divide the {rows} rows of an expert's up_proj"
            )
        if moe.shared:
            yield from _divides(parallel, "rows of the shared experts' up_proj", moe.shared.ffn_hidden_size)
        yield from _needs_sequence_parallel(parallel, "MoE")


def _pipeline(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """PP x VPP divides the layers, or the chunks' layers are given and are all of the model's."""
    layers = architecture.num_layers
    if parallel.pipeline_layers is not None:
        if (total := sum(parallel.pipeline_layers)) != layers:
            given = _numbers(parallel.pipeline_layers)
            yield Violation(
                "pipeline_layers", f"--pipeline-layers {given} are {total} layers, and the model has {layers}"
            )
    elif layers % parallel.pipeline:
        yield Violation(
            "pipeline", f"--pipeline-parallel {parallel.pipeline} does not divide the model's {layers} layers"
        )
    elif layers % parallel.chunks:
        yield Violation(
            "virtual_pipeline",
            f"--pipeline-parallel {parallel.pipeline} x --virtual-pipeline {parallel.virtual_pipeline} does not divide "
            f"the model's {layers} layers",
        )


def _context(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """CP computes attention over the whole sequence, and everything else by token."""
    if parallel.context == 1:
        return
    flag, cannot = f"--context-parallel {parallel.context}", "is not supported with context parallelism"
    if architecture.delta_net:
        yield Violation("context", f"{flag}: a gated delta net {cannot}: its state runs along the whole sequence")
    if architecture.prefix:
        yield Violation(
            "context", f"{flag}: a prefix LM {cannot}: its mask and positions follow from the whole sequence"
        )
    rates = [architecture.embedding.dropout, *(layer.residual.dropout for layer in _kinds(architecture))]
    rates += [attention.dropout for attention in _attentions(architecture)]
    if any(rates):
        yield Violation("context", f"{flag}: dropout {cannot}: all its ranks would drop the same elements")
    if parallel.context_exchange == "heads":
        yield from _head_exchange(parallel, architecture)


def _head_exchange(parallel: ParallelConfig, architecture: Architecture) -> Iterator[Violation]:
    """TP x CP divides query and key/value heads."""
    ranks = parallel.tensor * parallel.context
    for attention in _attentions(architecture):
        for what, heads in (("attention heads", attention.heads), ("key/value heads", attention.groups)):
            if heads % ranks:
                yield Violation(
                    "context_exchange",
                    f"--context-parallel-exchange heads: --tensor-parallel {parallel.tensor} x --context-parallel "
                    f"{parallel.context} does not divide the model's {heads} {what}",
                )


MODEL_RULES: tuple[Rule, ...] = (_attention, _mla, _delta_net, _mlp, _moe, _pipeline, _context)


def _kinds(architecture: Architecture) -> Iterator[Layer]:
    yield from architecture.kinds
    if architecture.mtp:
        yield architecture.mtp.layer


def _mixers[T](architecture: Architecture, kind: type[T]) -> Iterator[T]:
    yield from (layer.mixer for layer in _kinds(architecture) if isinstance(layer.mixer, kind))


def _attentions(architecture: Architecture) -> Iterator[Attention | LatentAttention]:
    yield from _mixers(architecture, Attention)
    yield from _mixers(architecture, LatentAttention)


def _divides(parallel: ParallelConfig, what: str, size: int) -> Iterator[Violation]:
    if size % parallel.tensor:
        yield Violation("tensor", f"--tensor-parallel {parallel.tensor} does not divide the model's {size} {what}")


def _needs_sequence_parallel(parallel: ParallelConfig, what: str) -> Iterator[Violation]:
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield Violation(
            "sequence_parallel", f"{what} with --tensor-parallel {parallel.tensor} needs sequence parallelism"
        )
