"""`pretrain train`: trains a Megatron checkpoint on indexed datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.training import plan_file, stage
from shared.training.options import TrainingOptions
from shared.training.plan import Inputs

if TYPE_CHECKING:
    from shared.training.data import Dataset
    from shared.training.data_sources import DataSource
    from shared.training.samplers import Order

_SEQUENCE_LENGTH = 4096  # tokens, default; limited by the model's context length


def run(
    options: TrainingOptions,
    *,
    sequence_length: int | None,
    epochs: int | None,
    document_mask: bool,
    tokenizer: Path | None,
    plan: Path | None = None,
) -> int | None:
    """Train. Returns the exit code of the worker processes, if any.

    Args:
        options: the command's options.
        sequence_length: tokens per sequence; None: the model's context length, at most 4096.
        epochs: passes over the data, of several until the first is used up; None: 1, or `options.steps`.
        document_mask: attend within documents.
        tokenizer: a directory, of plain Megatron pairs in `options.data`.
        plan: a file of `pretrain plan`, which says the layout.

    Raises:
        UserError: inputs or options are inconsistent.
    """
    if epochs is not None and options.steps is not None:
        raise UserError("--epochs and --steps both say how long to train; give one of them")
    inputs = Inputs.open(
        options.source,
        options.data,
        data_format="indexed",
        iteration=options.iteration,
        tokenizer=tokenizer,
        adapter=options.adapter,
    )
    if document_mask and inputs.architecture.prefix:
        raise UserError(
            f"--document-mask: the model of --source {options.source} is a prefix LM ({inputs.architecture.family}), which "
            "takes its positions and its mask from tokens of the text; leave it out"
        )
    length = sequence_length or min(inputs.architecture.max_position_embeddings, _SEQUENCE_LENGTH)
    if plan is not None:
        options = plan_file.taken(options, plan, architecture=inputs.architecture, sequence_length=length)
    splits = [_training_split(source, length) for source in inputs.data]
    blend = stage.blend(options, inputs, [(split["tokens"] - 1) // length for split in splits])
    steps = options.steps or max(blend.epoch * (epochs or 1) // options.global_batch_size, 1)
    if plan is not None:
        plan_file.check_world(plan, stage.parallel_config(options).processes)
    config = stage.plan(options, steps=steps, sequence_length=length, adapter=inputs.lora)

    def datasets(order: Order) -> tuple[Dataset, Dataset | None]:
        from shared.training.data import IndexedSequences, blended

        def opened(split: str, seed: int | None) -> dict[str, Dataset]:
            return {
                source.name: IndexedSequences(
                    source.files(split), length, seed=seed, order=order, document_mask=document_mask
                )
                for source in inputs.data
                if split in source.splits
            }

        training = list(opened("train", config.seed).values())
        return blended(blend, training), stage.validation(options, inputs, opened("validation", None))

    return stage.run(
        options,
        config,
        inputs,
        blend=blend,
        items=max([split["documents"] for split in splits] + list(blend.sequences)),
        datasets=datasets,
        packed=document_mask,
        bytes_per_token=_bytes_per_target(options, inputs, document_mask),
        notes=("documents   attention within each, positions restart, no loss of its first token",) * document_mask,
    )


def _training_split(source: DataSource, length: int) -> dict[str, Any]:
    split: dict[str, Any] | None = source.splits.get("train")
    if split is None:
        raise UserError(f"--data {source.path} has no train split; make one with `pretrain prepare`")
    if split["tokens"] <= length:
        raise UserError(
            f"--data {source.path} has {split['tokens']} tokens to train on, fewer than one sequence of {length}; "
            "give a smaller --sequence-length or more data"
        )
    return split


def _bytes_per_target(options: TrainingOptions, inputs: Inputs, document_mask: bool) -> float | None:
    """UTF-8 bytes of the validation splits per target, in their shares of the validation; None without one."""
    utf8_bytes = targets = 0.0
    for source, share in zip(inputs.data, options.data_weights or [None] * len(inputs.data), strict=True):
        if split := source.splits.get("validation"):
            weight = 1 if share is None else share / split["tokens"]
            utf8_bytes += weight * split["utf8_bytes"]
            targets += weight * (split["tokens"] - document_mask * split["documents"])
    return utf8_bytes / targets if targets else None
