"""`infer`: serve, generate, chat and evaluate with a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import ExistingDir, ExistingFile, NonNegative, Positive, Tool

Precision = Literal["bf16", "fp16", "fp32"]
Fraction = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]  # the range that vLLM takes
Port = Annotated[int, Field(ge=0, le=65535)]

tool = Tool("infer", summary="Serve, generate, chat and evaluate with vLLM, from a Hugging Face directory.")


@tool.command(neutral=("batch_size", "tensor_parallel"))
def generate(
    source: ExistingDir,
    prompts: ExistingFile,
    target: Path,
    max_tokens: Positive = 256,
    temperature: Temperature = 0.0,
    top_p: Fraction = 1.0,
    samples: Positive = 1,
    seed: NonNegative = 0,
    batch_size: Positive | None = None,
    max_model_len: Positive | None = None,
    precision: Precision | None = None,
    tensor_parallel: Positive = 1,
    overwrite: bool = False,
) -> None:
    """Complete every prompt of a jsonl file.

    Each line holds "prompt" (raw text) or "messages" (put through the chat template); its other fields are kept.
    Publishes TARGET/generations.jsonl, in the order of the input.

    Args:
        source: Hugging Face directory of the model.
        prompts: jsonl file, one object with "prompt" or "messages" a line.
        target: directory to publish.
        max_tokens: most tokens of a completion.
        temperature: 0 takes the likeliest token each time; above, samples.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        samples: completions of each prompt.
        seed: of the sampling; each line and sample has its own stream, whatever the batch.
        batch_size: most prompts at once; by default what suits the machine.
        max_model_len: context length in tokens; by default the model's own.
        precision: by default that of the checkpoint.
        tensor_parallel: GPUs that share the model.
        overwrite: replace what is published at the target.
    """
    from tools.infer.generate import Sampling, run

    run(
        source,
        prompts,
        target,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, samples=samples, seed=seed),
        batch_size=batch_size,
        max_model_len=max_model_len,
        precision=precision,
        tensor_parallel=tensor_parallel,
        overwrite=overwrite,
    )


@tool.command(neutral=("batch_size", "tensor_parallel"))
def evaluate(
    source: ExistingDir,
    tasks: tuple[str, ...],
    target: Path,
    engine: Literal["vllm", "hf"] = "vllm",
    limit: Positive | None = None,
    batch_size: Positive | None = None,
    apply_chat_template: bool = False,
    keep_samples: bool = False,
    max_model_len: Positive | None = None,
    precision: Precision | None = None,
    tensor_parallel: Positive = 1,
    seed: NonNegative = 0,
    overwrite: bool = False,
) -> None:
    """Measure a model with lm-evaluation-harness.

    A task is a YAML file of your own, a directory of them, or the name of one that the harness brings. Files that a
    YAML names (data_files, include, !function) are taken relative to it. Publishes TARGET/results.json and prints a
    table.

    Args:
        source: Hugging Face directory of the model.
        tasks: task files, directories or names, comma separated.
        target: directory to publish.
        engine: vllm, or hf (transformers) to check against.
        limit: only the first so many examples of each task.
        batch_size: most sequences at once; by default what suits the machine.
        apply_chat_template: put each prompt through the chat template.
        keep_samples: publish samples_TASK.jsonl, every example with the model's answer, too.
        max_model_len: context length in tokens; by default the model's own.
        precision: by default that of the checkpoint.
        tensor_parallel: GPUs that share the model (vllm only).
        seed: of few-shot examples and sampling.
        overwrite: replace what is published at the target.
    """
    from tools.infer.evaluate import run

    run(
        source,
        tasks,
        target,
        engine=engine,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        keep_samples=keep_samples,
        max_model_len=max_model_len,
        precision=precision,
        tensor_parallel=tensor_parallel,
        seed=seed,
        overwrite=overwrite,
    )


@tool.command
def chat(
    source: ExistingDir,
    system: str | None = None,
    max_tokens: Positive = 512,
    temperature: Temperature = 0.0,
    top_p: Fraction = 1.0,
    seed: NonNegative = 0,
    max_model_len: Positive | None = None,
    precision: Precision | None = None,
    tensor_parallel: Positive = 1,
) -> None:
    """Talk to a model in the terminal.

    /reset forgets the conversation, /exit or end of input leaves. Each line of a pipe is a turn of one conversation.

    Args:
        source: Hugging Face directory of the model; its tokenizer must have a chat template.
        system: system message that opens the conversation.
        max_tokens: most tokens of a reply.
        temperature: 0 takes the likeliest token each time; above, samples.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        seed: of the sampling.
        max_model_len: context length in tokens; by default the model's own.
        precision: by default that of the checkpoint.
        tensor_parallel: GPUs that share the model.
    """
    from tools.infer.chat import run

    run(
        source,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_model_len=max_model_len,
        precision=precision,
        tensor_parallel=tensor_parallel,
    )


@tool.command
def serve(
    source: ExistingDir,
    host: str = "127.0.0.1",
    port: Port = 8000,
    served_model_name: str | None = None,
    max_model_len: Positive | None = None,
    precision: Precision | None = None,
    tensor_parallel: Positive = 1,
    batch_size: Positive | None = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Prints `ready http://HOST:PORT/v1 NAME` on stdout once requests are answered. SIGTERM and Ctrl-C end it, with exit
    code 0.

    Args:
        source: Hugging Face directory of the model.
        host: address to listen on; 0.0.0.0 for every one, which lets others in.
        port: port to listen on; 0 takes a free one.
        served_model_name: name by which requests ask for the model; by default that of the directory.
        max_model_len: context length in tokens; by default the model's own.
        precision: by default that of the checkpoint.
        tensor_parallel: GPUs that share the model.
        batch_size: most requests at once, further ones wait; by default what suits the machine.
    """
    from tools.infer.serve import run

    run(
        source,
        host=host,
        port=port,
        served_model_name=served_model_name,
        max_model_len=max_model_len,
        precision=precision,
        tensor_parallel=tensor_parallel,
        batch_size=batch_size,
    )


def main() -> None:
    """The console script."""
    tool.run()
