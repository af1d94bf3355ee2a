"""`infer`: serve, generate, chat and evaluate with a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shared.cli import Existing, ExistingDir, ExistingFile, NonNegative, Positive, Seed, Tool
from shared.data.text_options import TextOptions
from shared.errors import UserError
from tools.infer.engines.engine import EngineName
from tools.infer.engines.sampling import Sampling
from tools.infer.options import (
    Fraction,
    Logprobs,
    LoraRank,
    ModelOptions,
    Probability,
    RepetitionPenalty,
    ServerOptions,
    Temperature,
)

tool = Tool("infer", summary="Serve, generate, chat and evaluate with vLLM, from a Hugging Face directory.")


@tool.command(
    not_fingerprinted=("batch_size", "tensor_parallel"),
    added=("engine", "top_k", "min_p", "repetition_penalty", "stop", "logprobs", "json_schema", "template_argument"),
)
def generate(
    source: ExistingDir,
    prompts: Existing,
    target: Path,
    engine: EngineName | None = None,
    max_tokens: Positive = 256,
    temperature: Temperature = 0.0,
    top_p: Fraction = 1.0,
    top_k: NonNegative = 0,
    min_p: Probability = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: tuple[str, ...] = (),
    logprobs: Logprobs | None = None,
    json_schema: ExistingFile | None = None,
    template_argument: tuple[str, ...] = (),
    samples: Positive = 1,
    seed: Seed = 0,
    batch_size: Positive | None = None,
    *,
    model: ModelOptions,
    overwrite: bool = False,
) -> None:
    """Complete every prompt of a file.

    Each row holds "prompt" (raw text) or "messages" (put through the chat template, with "tools" if the row has them);
    its other fields are copied. A row's "sampling" sets max_tokens, temperature, stop, json_schema and the like for it
    alone, its "chat_template_kwargs" variables of the chat template. Publishes TARGET/generations.jsonl, in the order of the
    input. Killed or stopped, the same command keeps what is finished and does the rest.

    Args:
        source: Hugging Face directory of the model.
        prompts: JSON lines (also .gz, .zst), a JSON array, parquet, arrow, or a folder of them; "prompt" or "messages"
            in each row.
        target: directory to publish.
        engine: vllm, or hf (transformers); by default vllm, and hf for models that vLLM does not run.
        max_tokens: most tokens of a completion.
        temperature: 0 decodes greedily; above, samples.
        top_p: nucleus sampling: the most likely tokens that together have this probability.
        top_k: sample from this many most likely tokens; 0: from all.
        min_p: least probability of a token, as a share of the most likely one's.
        repetition_penalty: divides logits of tokens of prompt and completion if positive, multiplies them if negative.
        stop: texts that end a completion, comma separated; they are no part of it.
        logprobs: also give each token's log-probability and those of this many most likely tokens.
        json_schema: file of a JSON Schema that every completion fits (vllm only).
        template_argument: variables of the chat template, separated by commas: enable_thinking=false.
        samples: completions of each prompt.
        seed: sampling seed; each line and sample has a random stream of its own, whatever the batch.
        batch_size: most sequences at once (vllm only); by default the engine's choice.
        overwrite: replace what is published at the target.
    """
    from tools.infer.generate import run

    run(
        source,
        prompts,
        target,
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            logprobs=logprobs,
            samples=samples,
            seed=seed,
        ),
        settings=model.settings(engine=engine, batch_size=batch_size, seed=seed),
        overwrite=overwrite,
        json_schema=json_schema,
        template_argument=template_argument,
    )


@tool.command(
    not_fingerprinted=("batch_size", "tensor_parallel", "api_key_file"),
    added=("generation_argument", "bootstrap", "url", "served_model_name"),
)
def evaluate(
    source: ExistingDir,
    tasks: tuple[str, ...],
    target: Path,
    engine: EngineName | None = None,
    url: str | None = None,
    served_model_name: str | None = None,
    api_key_file: ExistingFile | None = None,
    limit: Positive | None = None,
    num_fewshot: NonNegative | None = None,
    batch_size: Positive | None = None,
    apply_chat_template: bool = False,
    keep_samples: bool = False,
    generation_argument: tuple[str, ...] = (),
    bootstrap: NonNegative = 100_000,
    *,
    model: ModelOptions,
    seed: Seed | None = None,
    overwrite: bool = False,
) -> None:
    """Measure a model with lm-evaluation-harness.

    A task is a YAML file, a directory of them, or the name of a task of the harness. A YAML file may be a group; the
    tasks it lists are in it, in files beside it, or the harness's. Files that a YAML names (data_files, include,
    !function) are relative to it. Publishes TARGET/results.json and report.html and prints a table. The
    numbers are those of the harness's own command line.

    Args:
        source: Hugging Face directory of the model.
        tasks: task files, directories or names, comma separated.
        target: directory to publish.
        engine: vllm, or hf (transformers); by default vllm, and hf for models that vLLM does not run.
        url: address of a running server of the model, as in its ready line; --source then gives the tokenizer only.
        served_model_name: model name in requests to --url; by default the server's first.
        api_key_file: file with the key of the server of --url.
        limit: evaluate only this many examples of each task.
        num_fewshot: few-shot examples before each question; by default the task's own number. A task that says 0 keeps it.
        batch_size: most sequences at once; by default the engine's choice.
        apply_chat_template: put each prompt through the chat template.
        keep_samples: also publish samples_TASK.jsonl, every example with the model's answer.
        generation_argument: settings of tasks that generate text, in place of their own, separated by commas:
            max_gen_toks=64, temperature=0.7, do_sample=true.
        bootstrap: resamples of standard errors that have no closed form; 0 leaves those errors out.
        tensor_parallel: GPUs that share the model (vllm only).
        seed: of few-shot examples and sampling; by default the harness's own.
        overwrite: replace what is published at the target.
    """
    from tools.infer.evaluate import ServerOptions, run

    if url is None:
        for flag, value in (("--served-model-name", served_model_name), ("--api-key-file", api_key_file)):
            if value is not None:
                raise UserError(f"{flag} belongs to --url; leave it out")
    run(
        source,
        tasks,
        target,
        server=None if url is None else ServerOptions(url=url, name=served_model_name, api_key_file=api_key_file),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        keep_samples=keep_samples,
        settings=model.settings(engine=engine, batch_size=batch_size),
        overwrite=overwrite,
        generation_argument=generation_argument,
        bootstrap=bootstrap,
        seed=seed,
    )


@tool.command(not_fingerprinted=("batch_size", "tensor_parallel"))
def evaluate_text(
    source: ExistingDir,
    options: TextOptions,
    engine: EngineName | None = None,
    batch_size: Positive | None = None,
    *,
    model: ModelOptions,
) -> None:
    """Measure the bits per byte of text files.

    Each file is a document, or has one a row. Every token is predicted once, in windows of --window tokens. Publishes
    TARGET/results.json, samples_FILE.jsonl and report.html; `pretrain evaluate-text` measures Megatron checkpoints,
    and `infer compare` compares two results.

    Args:
        source: Hugging Face directory of the model.
        engine: vllm, or hf (transformers); by default vllm, and hf for models that vLLM does not run.
        batch_size: most windows at once; by default the engine's choice.
    """
    from tools.infer.evaluate_text import run

    run(source, options, settings=model.settings(engine=engine, batch_size=batch_size))


@tool.command(positional=("baseline", "source"))
def compare(
    baseline: ExistingDir,
    source: ExistingDir,
    target: Path,
    resamples: Positive = 10_000,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Compare two results of `infer evaluate --keep-samples` on the same examples, by paired bootstrap.

    For every metric of every task: the difference, its standard error and 95% interval, the share of draws in which the
    second is larger, and a two-sided p. Publishes TARGET/comparison.json and report.html and prints a table.

    Args:
        baseline: the first result.
        source: the second result, from which the first is subtracted.
        target: directory to publish.
        resamples: draws of the examples.
        seed: of the draws.
        overwrite: replace what is published at the target.
    """
    from tools.infer.compare import run

    run(baseline, source, target, resamples=resamples, seed=seed, overwrite=overwrite)


@tool.command
def card(
    source: ExistingDir,
    results: tuple[ExistingDir, ...],
    target: Path,
    overwrite: bool = False,
) -> None:
    """Publish a model with the results of its evaluations in its model card.

    The target is the source with another README.md: `model-index` in its front matter has the metrics of the results, each
    with its task and the number of few-shot examples. Text and other fields stay. Weights are hard links where source and
    target are on one file system, else copies.

    Args:
        source: Hugging Face directory of the model.
        results: directories of `infer evaluate` of this model, comma separated.
        target: directory to publish.
        overwrite: replace what is published at the target.
    """
    from tools.infer.card import run

    run(source, results, target, overwrite=overwrite)


@tool.command
def chat(
    source: ExistingDir,
    engine: EngineName | None = None,
    system: str | None = None,
    max_tokens: Positive = 512,
    temperature: Temperature = 0.0,
    top_p: Fraction = 1.0,
    seed: Seed = 0,
    thinking: Literal["shown", "hidden"] = "shown",
    template_argument: tuple[str, ...] = (),
    *,
    model: ModelOptions,
) -> None:
    """Talk to a model in the terminal.

    Enter sends; Alt-Enter or a backslash before Enter begin a new line. Ctrl-C stops a reply. /reset starts a new
    conversation, /exit or Ctrl-D leaves, /help lists keys. Each line of a pipe is a turn of one conversation.

    Args:
        source: Hugging Face directory of the model; its tokenizer must have a chat template.
        engine: vllm, or hf (transformers); by default vllm, and hf for models that vLLM does not run.
        system: system message that opens the conversation.
        max_tokens: most tokens of a reply.
        temperature: 0 decodes greedily; above, samples.
        top_p: nucleus sampling: the most likely tokens that together have this probability.
        seed: sampling seed.
        thinking: whether the part of a reply between <think> and </think> is shown or hidden.
        template_argument: variables of the chat template, separated by commas: enable_thinking=false.
    """
    from shared.data.chat_template import template_arguments
    from tools.infer.chat import run

    run(
        source,
        system=system,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed),
        settings=model.settings(engine=engine, batch_size=1, seed=seed),
        thinking=thinking,
        arguments=template_arguments(template_argument),
    )


@tool.command(rest="vllm_flags")
def serve(
    source: ExistingDir,
    served_model_name: str | None = None,
    chat_template: ExistingFile | None = None,
    adapter: tuple[str, ...] = (),
    lora_rank: LoraRank | None = None,
    reload_from: ExistingDir | None = None,
    *,
    server: ServerOptions,
    model: ModelOptions,
    batch_size: Positive | None = None,
    vllm_flags: tuple[str, ...] = (),
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Prints `ready http://HOST:PORT/v1 NAME` on stdout once the server answers requests. On SIGTERM it accepts no further
    connection and finishes the requests in flight; on Ctrl-C it ends at once. Both exit with code 0.

    Args:
        source: Hugging Face directory of the model.
        served_model_name: model name in requests; by default the directory's.
        chat_template: Jinja file; by default the tokenizer's template.
        adapter: LoRA adapters of the model, as NAME=DIR, comma separated; requests for the model NAME get it.
        lora_rank: room for adapters loaded later from --reload-from; by default the largest rank of --adapter.
        reload_from: folder of directories that `infer reload` may put in the model's place, and of adapters that may be
            loaded; by default none.
        batch_size: most requests at once, further ones wait; by default the engine's choice.
        vllm_flags: flags of `vllm serve`, as --tool-call-parser hermes --enable-auto-tool-choice.
    """
    from tools.infer.serve import ServerSettings, run

    run(
        source,
        server=ServerSettings(
            **vars(server),
            served_model_name=served_model_name,
            chat_template=chat_template,
            adapters=adapter,
            lora_rank=lora_rank,
            weights_below=reload_from,
            vllm_flags=vllm_flags,
        ),
        settings=model.settings(batch_size=batch_size),
    )


@tool.command(rest="vllm_flags")
def rollouts(
    source: ExistingDir,
    policies: ExistingDir | None = None,
    broadcasts: bool = False,
    lora_rank: LoraRank | None = None,
    served_model_name: str = "policy",
    *,
    server: ServerOptions,
    model: ModelOptions,
    batch_size: Positive | None = None,
    vllm_flags: tuple[str, ...] = (),
) -> None:
    """Sample replies for a trainer that publishes its policy again and again.

    The server of `infer serve`, with `POST /v1/policy` for a newer policy and `GET /v1/policy` for the version that
    answers. Log-probabilities are those of softmax(logits / temperature), from which it samples: generation_config.json of
    the model sets no default.

    Args:
        source: Hugging Face directory of the first policy.
        policies: folder below which the trainer publishes; the server reads nothing elsewhere.
        broadcasts: also, or only, take policies that a trainer broadcasts, from whoever may send requests.
        lora_rank: take policies as LoRA adapters of --source of at most this rank, and no others; requests name the version
            as their model.
        served_model_name: model name in requests.
        batch_size: most replies at once, further ones wait; by default the engine's choice.
        vllm_flags: flags of `vllm serve`.
    """
    from tools.infer.rollouts import run
    from tools.infer.serve import ServerSettings

    settings = ServerSettings(**vars(server), served_model_name=served_model_name, vllm_flags=vllm_flags)
    run(
        source,
        policies,
        broadcasts=broadcasts,
        lora_rank=lora_rank,
        server=settings,
        settings=model.settings(batch_size=batch_size),
    )


@tool.command(positional=("url", "source"))
def reload(
    url: str,
    source: Path,
    version: str | None = None,
    api_key_file: ExistingFile | None = None,
    timeout: Positive = 600,
) -> None:
    """Give a running server the weights of a newer directory.

    The server, started with --reload-from, reads and checks the directory whole: the same architecture, tokenizer, tensor
    names, shapes and dtypes as its own, and no NaN. A directory that is not taken leaves the old weights in place, which is
    exit code 2. Requests in flight get the old weights' answers to their end; later ones wait for the new weights.

    Args:
        url: address of the server, as in its ready line.
        source: directory with the weights, at the path under which the server sees it.
        version: name of these weights in `GET /v1/policy`; by default the directory's.
        api_key_file: file with the server's key.
        timeout: seconds for check, requests in flight and exchange.
    """
    from tools.infer.reload import run

    run(url, source, version=version, api_key_file=api_key_file, timeout=timeout)


@tool.command(positional=("url",), not_fingerprinted=("api_key_file",))
def bench(
    url: str,
    source: ExistingDir,
    target: Path,
    concurrency: tuple[Positive, ...] = (1, 8, 32),
    requests: Positive = 200,
    input_tokens: Positive = 256,
    output_tokens: Positive = 128,
    model: str | None = None,
    api_key_file: ExistingFile | None = None,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Measure a running server with vLLM's benchmark client.

    Sends random prompts to /v1/completions, at one concurrency after the other, and takes streamed greedy replies of full length.
    Publishes TARGET/bench.json and TARGET/report.html: tokens per second, and mean, p50 and p99 of the time to the first token
    (TTFT), per later token (TPOT), between tokens (ITL) and of whole replies. Prints a table.

    Args:
        url: address of the server, as in its ready line.
        source: directory that it serves, for its tokenizer.
        target: directory to publish.
        concurrency: requests at once, comma separated: a run for each.
        requests: of each run; as many as the concurrency come before it and are not measured.
        input_tokens: length of a prompt.
        output_tokens: length of a reply.
        model: name of the model or adapter; by default the server's first.
        api_key_file: file with the server's key.
        seed: of the prompts.
        overwrite: replace what is published at the target.
    """
    from tools.infer.bench import Load, run

    run(
        url,
        source,
        target,
        concurrency=concurrency,
        load=Load(requests=requests, input_tokens=input_tokens, output_tokens=output_tokens, seed=seed),
        model=model,
        api_key_file=api_key_file,
        overwrite=overwrite,
    )


def main() -> None:
    """The console script."""
    tool.run()
