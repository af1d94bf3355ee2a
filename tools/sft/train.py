"""`sft train`: fine-tunes a Megatron checkpoint on packed conversations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.training import stage
from shared.training.options import TrainingOptions
from shared.training.plan import Inputs

if TYPE_CHECKING:
    from shared.training.data import Dataset
    from shared.training.samplers import Order

_EPOCHS = 3
_REPLY_TOKENS = 128


def run(
    options: TrainingOptions,
    *,
    epochs: int | None,
    prompts: Path | None = None,
    prompts_every: int | None = None,
    reply_tokens: int | None = None,
) -> int | None:
    """Train. Returns the exit code of the worker processes, if any.

    Args:
        options: the command's options.
        epochs: passes over the data; the last update is filled up from the next pass. None with `options.steps`.
        prompts: a file of prompts that the model answers during the run.
        prompts_every: updates between replies; None: as between validations.
        reply_tokens: tokens of a reply, at most; None: 128.

    Raises:
        UserError: inputs or options are inconsistent.
    """
    if epochs is not None and options.steps is not None:
        raise UserError("--epochs and --steps both say how long to train; give one of them")
    inputs = Inputs.open(
        options.source, options.data, data_format="packed", iteration=options.iteration, adapter=options.adapter
    )
    lengths = {source.facts["seq_length"] for source in inputs.data}
    if len(lengths) > 1:
        raise UserError(
            f"--data has rows of {' and '.join(map(str, sorted(lengths)))} tokens; prepare all of one length"
        )
    for source in inputs.data:
        split = source.splits.get("train")
        if split is None or not split["sequences"]:
            raise UserError(f"--data {source.path} has no train split; make one with `sft prepare`")
        if not split["target_tokens"]:
            raise UserError(f"--data {source.path} has no tokens with a loss: no assistant message")
    blend = stage.blend(options, inputs, [source.splits["train"]["sequences"] for source in inputs.data])
    steps = options.steps or -(-blend.epoch * (epochs or _EPOCHS) // options.global_batch_size)
    config = stage.plan(options, steps=steps, sequence_length=lengths.pop(), adapter=inputs.lora)
    replies = None
    if prompts is not None:
        from tools.sft.reply_prompts import replies_of

        every, limit = prompts_every or config.validate_every or steps, reply_tokens or _REPLY_TOKENS
        replies = replies_of(prompts, every=every, limit=limit, config=config, inputs=inputs)
    elif prompts_every is not None or reply_tokens is not None:
        flag = "--prompts-every" if prompts_every is not None else "--reply-tokens"
        raise UserError(f"{flag} belongs to --prompts, a file of prompts to answer; give it, or leave {flag} out")

    def datasets(order: Order) -> tuple[Dataset, Dataset | None]:
        from shared.training.data import PackedSequences, blended

        training = [PackedSequences(source.path, "train", seed=config.seed, order=order) for source in inputs.data]
        validation: dict[str, Dataset] = {
            source.name: PackedSequences(source.path, "validation", seed=None)
            for source in inputs.data
            if stage.has_validation(source)
        }
        return blended(blend, training), stage.validation(options, inputs, validation)

    return stage.run(
        options,
        config,
        inputs,
        blend=blend,
        items=max(blend.sequences),
        datasets=datasets,
        packed=True,
        replies=replies,
    )
