"""The `pretrain` command: a tokenizer, its dataset, and training with Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import Existing, ExistingDir, NonNegative, Positive, Tool

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]

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
    from tools.pretrain.tokenizer import run

    run(source=source, target=target, vocab_size=vocab_size, text_key=text_key, overwrite=overwrite)


@tool.command(neutral=("workers",))
def prepare(
    source: tuple[Existing, ...],
    tokenizer: ExistingDir,
    target: Path,
    validation: tuple[Existing, ...] | None = None,
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    text_key: str = "text",
    workers: NonNegative = 0,
    overwrite: bool = False,
) -> None:
    """Tokenise text into a Megatron indexed dataset.

    A text file is one document, a JSON-lines file one document a line; each document is ended by the end-of-sequence
    token. Killed, the same command goes on from the parts that were finished.

    Args:
        source: text or JSON-lines files (also .gz, .zst) or folders of them, separated by commas.
        tokenizer: a directory with a tokenizer: of `pretrain tokenizer`, a Hugging Face or a Megatron checkpoint.
        target: the directory to publish.
        validation: files or folders for the validation split.
        validation_fraction: share of the source's documents for the validation split, chosen by their content.
        text_key: the key of the text in JSON-lines rows.
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
        workers=workers,
        overwrite=overwrite,
    )


@tool.command(
    neutral=(
        "micro_batch_size",
        "tensor_parallel",
        "pipeline_parallel",
        "virtual_pipeline",
        "sequence_parallel",
        "processes",
        "recompute",
        "save_every",
        "keep",
        "log_every",
    )
)
def train(
    source: ExistingDir,
    data: ExistingDir,
    target: Path,
    steps: Positive | None = None,
    sequence_length: Positive | None = None,
    global_batch_size: Positive = 64,
    micro_batch_size: Positive | None = None,
    learning_rate: Rate = 3e-4,
    min_learning_rate: Rate | None = None,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    warmup_steps: NonNegative | None = None,
    decay_steps: NonNegative | None = None,
    weight_decay: Rate = 0.1,
    clip_grad: Rate = 1.0,
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    seed: NonNegative = 0,
    precision: Literal["bf16", "fp32"] = "bf16",
    recompute: Literal["none", "selective", "full"] = "none",
    tensor_parallel: Positive = 1,
    pipeline_parallel: Positive = 1,
    virtual_pipeline: Positive = 1,
    sequence_parallel: bool = False,
    processes: Positive | None = None,
    save_every: Positive = 500,
    keep: Positive = 2,
    log_every: Positive = 10,
    validate_every: NonNegative | None = None,
    validation_sequences: Positive = 1024,
    overwrite: bool = False,
) -> int | None:
    """Pretrain a model of a Megatron checkpoint on an indexed dataset, into a run directory of checkpoints.

    Killed or told to stop (SIGTERM, SIGUSR1: saved first, exit code 75), the same command goes on where it was, also
    with other numbers of processes. The target has metrics.jsonl, TensorBoard events and report.html.

    Args:
        source: the Megatron checkpoint to start from.
        data: a dataset of `pretrain prepare`.
        target: the run directory.
        steps: updates; by default one epoch of the data.
        sequence_length: tokens; by default what the model takes, up to 4096.
        global_batch_size: sequences per update.
        micro_batch_size: sequences per forward pass of one process; by default as many as make about 8192 tokens.
        learning_rate: the highest.
        min_learning_rate: where cosine and wsd end; by default a tenth of the highest.
        schedule: cosine, wsd (level, then 1 - sqrt) or constant, each after a linear warm-up.
        warmup_steps: updates of the warm-up; by default one in a hundred, at most 2000.
        decay_steps: updates of the falling end of wsd; by default a fifth.
        weight_decay: decoupled, on matrices; norms and biases have none.
        clip_grad: largest norm of the gradient; 0 leaves it as it is.
        adam_beta1: decay of the mean of gradients.
        adam_beta2: decay of the mean of their squares.
        seed: of the order of the data.
        precision: bf16 with fp32 main weights, or fp32.
        recompute: activations to compute again instead of keeping them: attention's (selective) or all.
        tensor_parallel: processes that share every matrix.
        pipeline_parallel: processes that hold consecutive layers.
        virtual_pipeline: groups of layers per process of a pipeline.
        sequence_parallel: cut norms and residuals along the sequence over the tensor-parallel processes.
        processes: one per GPU by default, without GPUs as many as the layout needs; what the layout leaves over is
            data parallel.
        save_every: updates between checkpoints; the last update is always saved.
        keep: checkpoints left in the target.
        log_every: updates between printed lines; metrics.jsonl has every update.
        validate_every: updates between validations, 0 for none but the first and the last; by default a tenth of
            the steps.
        validation_sequences: sequences to validate on at most, the same ones every time.
        overwrite: replace what another run left at the target.
    """
    from shared.training.stage import TrainingOptions
    from tools.pretrain.train import run

    return run(
        TrainingOptions(
            source=source,
            data=data,
            target=target,
            steps=steps,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            schedule=schedule,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            weight_decay=weight_decay,
            clip_grad=clip_grad,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
            seed=seed,
            precision=precision,
            recompute=recompute,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            virtual_pipeline=virtual_pipeline,
            sequence_parallel=sequence_parallel,
            processes=processes,
            save_every=save_every,
            keep=keep,
            log_every=log_every,
            validate_every=validate_every,
            validation_sequences=validation_sequences,
            overwrite=overwrite,
        ),
        sequence_length=sequence_length,
    )


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
