"""The `sft` command: instruction data, and fine-tuning with Megatron-Core."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import Existing, ExistingDir, ExistingFile, NonNegative, Positive, Tool
from shared.training.options import ADDED, NOT_FINGERPRINTED, Rate, TrainingOptions
from tools.sft.options import ADDED as ADDED_READING
from tools.sft.options import ReadingOptions

tool = Tool("sft", summary="Prepare conversations and fine-tune with Megatron-Core.")


@tool.command(not_fingerprinted=("workers",), added=ADDED_READING)
def prepare(
    source: tuple[Existing, ...],
    tokenizer: ExistingDir,
    target: Path,
    reading: ReadingOptions,
    sequence_length: Positive | None = None,
    validation: tuple[Existing, ...] | None = None,
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    overlong: Literal["error", "drop", "truncate"] = "error",
    workers: NonNegative = 0,
    overwrite: bool = False,
) -> None:
    """Pack conversations into rows, with a loss on the assistant's tokens only.

    Conversations are rendered by the tokenizer's chat template. A row holds whole conversations; attention never
    crosses from one to the next. The printed report accounts for every conversation.

    Args:
        source: files of JSON lines, JSON arrays (both also .gz, .zst), parquet or arrow, or folders of them, also as
            `datasets` saved them, separated by commas.
        tokenizer: a directory with a tokenizer and chat template: of `pretrain tokenizer`, a Hugging Face or a
            Megatron checkpoint.
        target: the directory to publish.
        sequence_length: tokens in a row; by default what the model's config.json takes, up to 4096.
        validation: files or folders for the validation split.
        validation_fraction: share of the source's conversations for the validation split, chosen by their content.
        overlong: what to do with a conversation longer than a row.
        workers: processes that tokenise; 0 uses every core.
        overwrite: replace what is published at the target.
    """
    from tools.sft.prepare import run

    run(
        source=source,
        tokenizer=tokenizer,
        target=target,
        sequence_length=sequence_length,
        validation=validation,
        validation_fraction=validation_fraction,
        reading=reading,
        overlong=overlong,
        workers=workers,
        overwrite=overwrite,
    )


@tool.command
def preview(
    source: tuple[Existing, ...],
    tokenizer: ExistingDir,
    reading: ReadingOptions,
    html: Path | None = None,
) -> None:
    """Show conversations as `prepare` would train on them, the tokens with a loss in colour.

    Without a terminal, the tokens with a loss stand between \u27e6 and \u27e7. Nothing is published.

    Args:
        source: as in `prepare`.
        tokenizer: as in `prepare`.
        limit: conversations to show; by default 3.
        on_error: stop at a row that cannot be read or rendered, or show its reason: set-aside.
        html: a file to write a page to, instead of printing.
    """
    from tools.sft.preview import run

    run(source=source, tokenizer=tokenizer, reading=reading, html=html)


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions(TrainingOptions):
    """The defaults of fine-tuning: fewer sequences an update, small steps, no decay.

    Attributes:
        data: datasets of `sft prepare`, separated by commas.
        steps: updates; instead of --epochs.
        prompts: rows of conversations or prompts, up to 64, which the model answers during the run: into replies.jsonl and
            report.html.
        prompts_every: updates between replies, which are also made before the first and after the last; by default as many
            as between validations.
        reply_tokens: tokens of a reply, at most; by default 128.
    """

    global_batch_size: Positive = 32
    learning_rate: Rate = 2e-5
    weight_decay: Rate = 0.0
    prompts: ExistingFile | None = None
    prompts_every: Positive | None = None
    reply_tokens: Positive | None = None


REPLYING = ("prompts", "prompts_every", "reply_tokens")  # they change no weight


@tool.command(not_fingerprinted=(*NOT_FINGERPRINTED, *REPLYING), added=ADDED)
def train(options: FineTuningOptions, epochs: Positive | None = None) -> int | None:
    """Fine-tune a model of a Megatron checkpoint on packed conversations, into a run directory of checkpoints.

    Only the tokens of the assistant have a loss, and attention stays within a conversation. Killed or told to stop
    (SIGTERM, SIGUSR1: saved first, exit code 75), the same command resumes, also with other numbers of
    processes. The target has metrics.jsonl, report.html and the folders of trackers, with --prompts replies.jsonl.

    Args:
        epochs: passes over the data; by default 3, unless --steps says how long.
    """
    from tools.sft.train import run

    return run(
        options,
        epochs=epochs,
        prompts=options.prompts,
        prompts_every=options.prompts_every,
        reply_tokens=options.reply_tokens,
    )


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
