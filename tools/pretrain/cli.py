"""The `pretrain` command: a tokenizer, its dataset, and training with Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import Existing, ExistingDir, ExistingFile, NonNegative, Positive, Tool
from shared.data.text_options import TextOptions
from shared.parallel import ParallelConfig, ranks_needed
from shared.precision import RunPrecision, TrainingPrecision
from shared.rehearsal.machine import DEFAULT_GPU, GpuName
from shared.rehearsal.speed import GPUS_PER_NODE
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


@tool.command(
    not_fingerprinted=("workers", "shard", "tokenizer_backend"), added=("end_of_document", "bos", "deduplicate")
)
def prepare(
    source: tuple[Existing, ...],
    tokenizer: ExistingDir,
    target: Path,
    validation: tuple[Existing, ...] | None = None,
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    text_key: str = "text",
    end_of_document: str | None = None,
    bos: bool | None = None,
    deduplicate: Literal["exact", "minhash"] | None = None,
    tokenizer_backend: Literal["auto", "tokenizers"] = "auto",
    workers: NonNegative = 0,
    shard: str | None = None,
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
        deduplicate: keep the first of documents with the same text (exact), or also of those with nearly the same words
            (minhash).
        tokenizer_backend: auto takes fastokens, many times faster, if its ids are those of tokenizers on the first 10 MB of
            the text; tokenizers takes no other.
        workers: processes that tokenise; 0 uses every core.
        shard: one of several processes on a shared file system: 1/4 to 4/4 each tokenise their share, and the last one to
            finish publishes. The number may change between runs. publish/4 only publishes.
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
        deduplicate=deduplicate,
        tokenizer_backend=tokenizer_backend,
        workers=workers,
        shard=shard,
        overwrite=overwrite,
    )


@tool.command(not_fingerprinted=(*NOT_FINGERPRINTED, "plan"), added=(*ADDED, "epochs", "document_mask", "tokenizer"))
def train(
    options: TrainingOptions,
    sequence_length: Positive | None = None,
    epochs: Positive | None = None,
    document_mask: bool = False,
    tokenizer: ExistingDir | None = None,
    plan: ExistingFile | None = None,
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
        plan: a file of `pretrain plan --json`: the run has its best layout, micro batch and recomputation.
    """
    from tools.pretrain.train import run

    return run(
        options,
        sequence_length=sequence_length,
        epochs=epochs,
        document_mask=document_mask,
        tokenizer=tokenizer,
        plan=plan,
    )


@tool.command(not_fingerprinted=("json",))
def plan(
    source: Existing,
    gpus: Positive,
    global_batch_size: Positive,
    gpu: GpuName = DEFAULT_GPU,
    gpu_memory: str | None = None,
    gpus_per_node: Positive = GPUS_PER_NODE,
    sequence_length: Positive | None = None,
    precision: RunPrecision = "bf16",
    lora_rank: Positive | None = None,
    top: Positive = 5,
    json: Path | None = None,
) -> None:
    """Choose the parallel layout of a training run on GPUs that are not at hand.

    Legal layouts, with micro batches and recomputation, are dropped if their states do not fit; the most promising are rehearsed
    as by `pretrain train --rehearse`, and ranked by a roofline of what was rehearsed. Prints a table, the launch map, the
    assumptions and the command line of the best one. Memory and times are not compared with a GPU.

    Args:
        source: a Megatron or Hugging Face directory, or a config.json; no weight is read.
        gpus: how many GPUs.
        global_batch_size: sequences per update.
        gpu: their kind.
        gpu_memory: the memory of one, as 80GiB, in place of that kind's.
        gpus_per_node: GPUs of a node; groups that cross nodes use the network.
        sequence_length: tokens; by default what the model takes, up to 4096.
        precision: as of `pretrain train`.
        lora_rank: plan a training of LoRA adapters of this rank on all linear layers.
        top: rows of the table.
        json: a file for the plan, which `pretrain train --plan` takes.
    """
    from tools.pretrain.plan_layout import run

    run(
        source=source,
        gpus=gpus,
        global_batch_size=global_batch_size,
        gpu=gpu,
        gpu_memory=gpu_memory,
        gpus_per_node=gpus_per_node,
        sequence_length=sequence_length,
        lora_rank=lora_rank,
        precision=precision,
        top=top,
        json_file=json,
    )


_LAYOUT = ("tensor_parallel", "pipeline_parallel", "sequence_parallel", "context_parallel", "expert_parallel")


@tool.command(not_fingerprinted=(*_LAYOUT, "expert_tensor_parallel", "processes", "micro_batch_size"))
def evaluate_text(
    source: ExistingDir,
    options: TextOptions,
    micro_batch_size: Positive | None = None,
    precision: TrainingPrecision | None = None,
    iteration: NonNegative | None = None,
    tensor_parallel: Positive = 1,
    pipeline_parallel: Positive = 1,
    sequence_parallel: bool = False,
    context_parallel: Positive = 1,
    expert_parallel: Positive = 1,
    expert_tensor_parallel: Positive | None = None,
    processes: Positive | None = None,
) -> int | None:
    """Measure the bits per byte of text files with a Megatron checkpoint, without an export.

    A text file is one document, a JSON-lines file one document a row. Each token is predicted once: the first window of a
    document predicts up to --window tokens after one BOS (else EOS) token, each further window the next --stride tokens.
    Publishes TARGET/results.json, samples_FILE.jsonl and report.html, as `infer evaluate-text` does for Hugging Face
    directories; `infer compare` compares two.

    Args:
        source: a Megatron checkpoint or a run directory, with its tokenizer.
        micro_batch_size: windows of a forward pass; by default as many as make 8192 tokens.
        precision: fp32 or bf16; by default fp32 where the checkpoint has fp32 weights.
        iteration: a kept iteration of the source, a run directory; by default the newest.
        tensor_parallel: tensor parallel size.
        pipeline_parallel: pipeline parallel size.
        sequence_parallel: split norms and residuals along the sequence over the tensor-parallel ranks.
        context_parallel: context parallel size.
        expert_parallel: expert parallel size, for MoE.
        expert_tensor_parallel: tensor parallel size of experts; by default --tensor-parallel.
        processes: world size; by default one process per GPU, without GPUs as many as the layout needs.
    """
    from shared.training.plan import default_processes
    from tools.pretrain.evaluate_text import run

    needed = ranks_needed(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        context=context_parallel,
        expert=expert_parallel,
        expert_tensor=expert_tensor_parallel,
    )
    parallel = ParallelConfig(
        processes=processes or default_processes(needed),
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        sequence_parallel=sequence_parallel,
        context=context_parallel,
        expert=expert_parallel,
        expert_tensor=expert_tensor_parallel,
    )
    return run(
        source,
        options,
        micro_batch_size=micro_batch_size,
        precision=precision,
        iteration=iteration,
        parallel=parallel,
    )


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
