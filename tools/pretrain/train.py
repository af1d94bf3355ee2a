"""`pretrain train`: trains a Megatron checkpoint on an indexed dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.training import stage
from shared.training.options import TrainingOptions
from shared.training.plan import Inputs

if TYPE_CHECKING:
    from shared.training.data import Dataset

_SEQUENCE_LENGTH = 4096  # tokens, default; limited by the model's context length


def run(options: TrainingOptions, *, sequence_length: int | None) -> int | None:
    """Train. Returns the exit code of the worker processes, if any.

    Args:
        options: the command's options.
        sequence_length: tokens per sequence; None: the model's context length, at most 4096.

    Raises:
        UserError: inputs or options are inconsistent.
    """
    inputs = Inputs.open(options.source, options.data, data_format="indexed", iteration=options.iteration)
    length = sequence_length or min(inputs.architecture.max_position_embeddings, _SEQUENCE_LENGTH)
    training = inputs.split("train")
    if training is None:
        raise UserError(f"--data {options.data} has no train split; make one with `pretrain prepare`")
    sequences = (training["tokens"] - 1) // length
    if sequences < 1:
        raise UserError(
            f"--data {options.data} has {training['tokens']} tokens to train on, fewer than one sequence of {length}; "
            "give a smaller --sequence-length or more data"
        )
    steps = options.steps or max(sequences // options.global_batch_size, 1)  # one epoch
    config = stage.plan(options, steps=steps, sequence_length=length)
    validation = inputs.split("validation")

    def datasets() -> tuple[Dataset, Dataset | None]:
        from shared.training.data import IndexedSequences

        return (
            IndexedSequences(inputs.data.path / "train", length, seed=config.seed),
            IndexedSequences(inputs.data.path / "validation", length, seed=None) if validation else None,
        )

    return stage.run(
        options,
        config,
        inputs,
        sequences=sequences,
        datasets=datasets,
        bytes_per_token=validation["utf8_bytes"] / validation["tokens"] if validation else None,
    )
