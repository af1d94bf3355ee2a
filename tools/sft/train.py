"""`sft train`: fine-tunes a Megatron checkpoint on packed conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.training import stage
from shared.training.options import TrainingOptions
from shared.training.plan import Inputs

if TYPE_CHECKING:
    from shared.training.data import Dataset

_EPOCHS = 3


def run(options: TrainingOptions, *, epochs: int | None) -> int | None:
    """Train. Returns the exit code of the worker processes, if any.

    Args:
        options: the command's options.
        epochs: passes over the data; the last update is filled up from the next pass. None with `options.steps`.

    Raises:
        UserError: inputs or options are inconsistent.
    """
    if epochs is not None and options.steps is not None:
        raise UserError("--epochs and --steps both say how long to train; give one of them")
    inputs = Inputs.open(options.source, options.data, data_format="packed", iteration=options.iteration)
    training = inputs.split("train")
    if training is None or not training["sequences"]:
        raise UserError(f"--data {options.data} has no train split; make one with `sft prepare`")
    if not training["target_tokens"]:
        raise UserError(f"--data {options.data} has no tokens with a loss: no assistant message")
    sequences = training["sequences"]
    steps = options.steps or -(-sequences * (epochs or _EPOCHS) // options.global_batch_size)
    config = stage.plan(options, steps=steps, sequence_length=inputs.data.facts["seq_length"])
    has_validation = bool((inputs.split("validation") or {}).get("target_tokens"))

    def datasets() -> tuple[Dataset, Dataset | None]:
        from shared.training.data import PackedSequences

        return (
            PackedSequences(inputs.data.path, "train", seed=config.seed),
            PackedSequences(inputs.data.path, "validation", seed=None) if has_validation else None,
        )

    return stage.run(options, config, inputs, sequences=sequences, datasets=datasets)
