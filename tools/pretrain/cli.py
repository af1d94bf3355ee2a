"""The `pretrain` command: a tokenizer, its dataset, and training with Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared.cli import Existing, ExistingDir, NonNegative, Positive, Tool
from shared.training.options import ADDED, NOT_FINGERPRINTED, TrainingOptions

tool = Tool("pretrain", summary="Train a tokenizer, prepare text and pretrain with Megatron-Core.")


@tool.command
def tokenizer(
    source: tuple[Existing, ...],
    target: Path,
    vocab_size: Positive,
    text_key: str = "text",
    overwrite: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer and publish it as a Hugging Face tokenizer directory.

    Any UTF-8 text survives encoding and decoding unchanged. The directory has a chat template and opens with
    transformers' AutoTokenizer.

    Args:
        source: text or JSON-lines files (also .gz, .zst) or folders of them, separated by commas.
        target: the directory to publish.
        vocab_size: number of tokens, the 256 bytes and the special tokens included.
        text_key: the key of the text in JSON-lines rows.
        overwrite: replace what is published at the target.
    """
    from tools.pretrain.train_bpe import run

    run(source=source, target=target, vocab_size=vocab_size, text_key=text_key, overwrite=overwrite)


@tool.command(not_fingerprinted=("workers",), added=("end_of_document", "bos"))
def prepare(
    source: tuple[Existing, ...],
    tokenizer: ExistingDir,
    target: Path,
    validation: tuple[Existing, ...] | None = None,
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    text_key: str = "text",
    end_of_document: str | None = None,
    bos: bool | None = None,
    workers: NonNegative = 0,
    overwrite: bool = False,
) -> None:
    """Tokenise text into a Megatron indexed dataset.

    A text file is one document, a JSON-lines file one document a line; each document is ended by a token of its own.
    Killed, the same command reuses the finished parts.

    Args:
        source: text or JSON-lines files (also .gz, .zst) or folders of them, separated by commas.
        tokenizer: a directory with a tokenizer: of `pretrain tokenizer`, a Hugging Face or a Megatron checkpoint.
        target: the directory to publish.
        validation: files or folders for the validation split.
        validation_fraction: share of the source's documents for the validation split, chosen by their content.
        text_key: the key of the text in JSON-lines rows.
        end_of_document: the token that ends each document; by default the tokenizer's eos token, or, where that ends a turn
            of a chat, the token of its vocabulary that ends documents.
        bos: begin each document with the tokenizer's bos token; by default if the tokenizer itself puts it before a text.
        workers: processes that tokenise; 0 uses every core.
        overwrite: replace what is published at the target.
    """
    from tools.pretrain.prepare import run

    run(
        source=source,
        tokenizer=tokenizer,
        target=target,
        validation=validation,
        validation_fraction=validation_fraction,
        text_key=text_key,
        end_of_document=end_of_document,
        bos=bos,
        workers=workers,
        overwrite=overwrite,
    )


@tool.command(not_fingerprinted=NOT_FINGERPRINTED, added=(*ADDED, "epochs", "document_mask", "tokenizer"))
def train(
    options: TrainingOptions,
    sequence_length: Positive | None = None,
    epochs: Positive | None = None,
    document_mask: bool = False,
    tokenizer: ExistingDir | None = None,
) -> int | None:
    """Pretrain a model of a Megatron checkpoint on indexed datasets, into a run directory of checkpoints.

    Killed or told to stop (SIGTERM, SIGUSR1: saved first, exit code 75), the same command resumes, also
    with other numbers of processes. The target has metrics.jsonl, report.html and the folders of trackers.

    Args:
        data: datasets of `pretrain prepare`, or prefixes of plain Megatron pairs (PREFIX.bin, PREFIX.idx), separated by
            commas.
        sequence_length: tokens; by default what the model takes, up to 4096.
        epochs: passes over the data, of several datasets until the first is used up; by default 1, unless --steps says how
            long.
        document_mask: attend within documents only; positions restart, and a document's first token is no target.
        tokenizer: the directory of the tokenizer that plain Megatron pairs were made with.
    """
    from tools.pretrain.train import run

    return run(
        options,
        sequence_length=sequence_length,
        epochs=epochs,
        document_mask=document_mask,
        tokenizer=tokenizer,
    )


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
