"""`pretrain evaluate-text`: bits per byte of text files by a Megatron checkpoint, in any parallel layout."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from shared.checkpoint.directory.manifest import Inputs, parents_of, run_fingerprint
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.directory.target import check_target
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.console import log
from shared.data.text_options import TextOptions
from shared.data.text_windows import checked_window, prefix_token, read_documents, windows_of
from shared.data.tokenizer import open_tokenizer
from shared.errors import UserError
from shared.invocation import invocation
from shared.model.support import check_supported
from shared.parallel import ParallelConfig
from shared.precision import DTYPES, TrainingPrecision
from shared.report.text_scores import RESULTS, log_likelihoods, metrics_of, text_report, write_text_report
from shared.runtime import progress
from shared.runtime.launch import launch, started_by_launch
from shared.runtime.silence_warnings import silence
from shared.training.plan import architecture_of

_MICRO_BATCH_TOKENS = 8192  # of a forward pass


def run(
    source: Path,
    options: TextOptions,
    *,
    micro_batch_size: int | None,
    precision: TrainingPrecision | None,
    iteration: int | None,
    parallel: ParallelConfig,
) -> int | None:
    """Measure and publish. Returns the exit code of the workers, if any. UserError for what does not fit."""
    inputs: Inputs = {"source": source, "text": options.text}
    checkpoint = open_checkpoint(source, kinds=("megatron",), flag="--source", verify="sizes", iteration=iteration)
    architecture = architecture_of(checkpoint)
    if architecture.prefix:
        raise UserError(
            f"--source {source}: the model is a prefix LM ({architecture.family}), which takes its mask from tokens of the "
            "text; export it with `convert to-hf`, and measure tasks with `infer evaluate`"
        )
    check_supported(architecture)
    parallel.check_model(architecture)
    size, step = checked_window(options.window, options.stride, architecture.max_position_embeddings)
    tokenizer = open_tokenizer(checkpoint.hf_files, flag="--source", needs_eos=False)
    documents = read_documents(options.text, options.text_key, tokenizer)
    windows = list(windows_of(documents, prefix_token(tokenizer), size, step))
    length = _padded(max(len(each.inputs) for each in windows), parallel, architecture.max_position_embeddings)
    if (largest := max(max(each.tokens) for each in documents)) >= architecture.vocab_size:
        raise UserError(
            f"--source {source}: its tokenizer gives id {largest}, and the model has {architecture.vocab_size}"
        )
    chosen = precision or _precision(checkpoint)
    if not started_by_launch():
        parents = parents_of(inputs)
        fingerprint = run_fingerprint(invocation(), inputs, parents)
        if options.target.is_dir():
            check_target(options.target, fingerprint=fingerprint, parents=parents, overwrite=options.overwrite)
        if os.environ.get("RANK", "0") == "0":
            verify_content(checkpoint, flag="--source")
    code = launch(parallel.processes)
    if code is not None:
        return code
    log(
        f"{len(documents)} documents of {sum(len(each.tokens) for each in documents):,} tokens in {len(windows)} windows of "
        f"up to {size}, stride {step}; {chosen}, {parallel.processes} process{'es' * (parallel.processes > 1)}"
    )
    silence()
    progress.begin(0)
    try:
        import torch  # in the workers only, as what follows

        import shared.runtime.device
        from shared.model import gpt, weights
        from shared.model.backend_choice import choose_backend
        from shared.runtime import process_groups
        from shared.training.text_likelihood import window_likelihoods

        process_groups.initialize(parallel, 0)
        backend, line = choose_backend(
            None,
            architecture,
            device_type=shared.runtime.device.select_device().type,
            attention_backend=None,
            fp8=None,
            pipeline=parallel.pipeline,
        )
        log(f"backend     {line}")
        chunks = gpt.build(
            architecture,
            parallel,
            dtype=torch.bfloat16 if chosen == "bf16" else torch.float32,
            backend=backend,
            calculate_per_token_loss=True,
        )
        weights.load(chunks, checkpoint.iteration_path)
        weights.check_finite(chunks, source)
        began = time.monotonic()
        values = window_likelihoods(
            chunks,
            windows,
            length=length,
            micro_batch_size=micro_batch_size or max(1, _MICRO_BATCH_TOKENS // length),
        )
        seconds = time.monotonic() - began
        first = torch.distributed.get_rank() == 0
        process_groups.destroy()
    finally:
        progress.end()
    if not first:
        return None
    if not all(map(math.isfinite, values)):
        raise UserError(f"--source {source}: the likelihood of a text is not finite in {chosen}; give --precision fp32")
    likelihoods = log_likelihoods(documents, [each.document for each in windows], values)
    model_arguments = {"source": str(source), "dtype": DTYPES[chosen], "layout": str(parallel) or "1 process"}
    report = text_report(
        documents,
        likelihoods,
        engine="megatron",
        model_arguments=model_arguments,
        window=size,
        stride=step,
        seconds=seconds,
    )
    with publish(options.target, kind="result", inputs=inputs, overwrite=options.overwrite) as out:
        write_text_report(out.path, report, documents, likelihoods, model=source.resolve().name)
        out.describe(engine="megatron", metrics=metrics_of(report), seconds=round(seconds, 2))
    for file, values_of in metrics_of(report).items():
        print(f"{file}  {values_of['bits_per_byte']:.6f} bits per byte")
    log(f"measured in {seconds:.1f} s: {options.target / RESULTS}")
    return None


def _padded(longest: int, parallel: ParallelConfig, context: int) -> int:
    """The common length of the windows, which the layout's ranks can share."""
    unit = 2 * parallel.context if parallel.context > 1 else 1
    unit *= parallel.tensor if parallel.sequence_parallel else 1
    length = -(-longest // unit) * unit
    if length > context:
        raise UserError(
            f"--window: windows of {longest} tokens do not divide among the ranks of this layout within the context of "
            f"{context}; give --window {context // unit * unit}"
        )
    return length


def _precision(checkpoint: Checkpoint) -> TrainingPrecision:
    """fp32 where a weight is in fp32, else bf16."""
    names = {tensor.dtype.name for tensor in TorchDistReader(checkpoint.iteration_path).tensors.values()}
    return "fp32" if "float32" in {name.removeprefix("torch.") for name in names} else "bf16"
