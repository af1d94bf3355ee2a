"""The training loop of pretraining and fine-tuning, top to bottom.

Every rank runs all of it. Work of rank 0 only (run directory, metrics, log lines) goes through `on_rank_0` or
`recorder`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

import shared.runtime.device
from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.recognition import iteration_name
from shared.console import log
from shared.data.labels import IGNORE
from shared.errors import Interrupted, StageError, UserError
from shared.model import gpt, lora, weights
from shared.model.attention_plan import attention_plan
from shared.model.backend import Backend
from shared.model.backend_choice import choose_backend
from shared.model.context_parallel import local_part
from shared.model.fp8_backend import Fp8Backend
from shared.model.te_backend import TEBackend
from shared.model.te_fp8 import check_sizes
from shared.report.track import Track
from shared.runtime import process_groups, progress
from shared.runtime.agreement import on_rank_0
from shared.runtime.extensions import compile_share_storage
from shared.runtime.stop_request import StopRequest
from shared.training import fp8_update, state
from shared.training.balance import take_balance
from shared.training.best import Best, after
from shared.training.blend import Blend
from shared.training.config import TrainingConfig
from shared.training.data import Batch, Dataset
from shared.training.loss import Loss, balancing_scale, global_loss, mtp_labels, token_loss
from shared.training.optimizer import build_optimizer, held_bytes, set_learning_rate, wrap
from shared.training.plan import Inputs
from shared.training.read_ahead import ReadAhead
from shared.training.recorder import SharedRunDirectory, samples_before
from shared.training.replies import Replies, greedy
from shared.training.samplers import Order, batch_positions
from shared.training.saver import Saver
from shared.training.storage import DISK, Storage
from shared.training.trainable import FULL, Frozen, Lora, Trainable


@dataclass(frozen=True, kw_only=True)
class Run:
    """Arguments of `train`."""

    config: TrainingConfig
    inputs: Inputs
    target: Path
    overwrite: bool
    extend: bool  # resume the target's run though some options differ
    blend: Blend
    order: Order  # of a new run; a resumed one keeps its own
    datasets: Callable[[Order], tuple[Dataset, Dataset | None]]  # training and validation
    packed: bool  # rows have several segments
    track: tuple[Track, ...]
    bytes_per_token: float | None = None  # UTF-8 bytes of the validation split per token
    replies: Replies | None = None  # prompts that are answered during the run
    storage: Storage = DISK


def train(run: Run) -> None:
    """Train for `steps` updates, from the source's weights or resumed from the target's last checkpoint.

    Raises:
        AlreadyDone: the target holds this run, finished.
        Interrupted: stopped by a signal; the state is saved.
        StageError: the loss or the gradient is not finite; the last checkpoint is kept.
    """
    progress.at("joining the other ranks", long=True)
    process_groups.initialize(run.config.parallel, run.config.seed)
    backend, line = backend_of(run.config, run.inputs.architecture)
    if isinstance(backend, Fp8Backend):
        check_device(run.config)
    log(f"backend     {line}")
    for line in attention_lines(run):
        log(f"attention   {line}")
    progress.at("opening the run directory", long=True)
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        directory = run.storage.open_run(run.target, run.inputs, overwrite=run.overwrite, extend=run.extend)
        stack.callback(directory.close)
        stopped_after = _train(run, backend, directory, stop, stack)
    process_groups.destroy()
    if stopped_after is not None:
        raise Interrupted(
            f"stopped by a signal after update {stopped_after}, which is saved; run the same command again to resume"
        )


def attention_lines(run: Run) -> list[str]:
    """The attention back end of each kind of layer. UserError for a named one that does not carry it."""
    return attention_plan(
        run.inputs.architecture,
        dtype=model_dtype(run.config),
        device=shared.runtime.device.select_device(),
        parallel=run.config.parallel,
        sequence_length=run.config.sequence_length,
        packed=run.packed,
        name=run.config.attention_backend,
    )


def check_device(config: TrainingConfig) -> None:
    """UserError for an FP8 recipe that the device does not compute."""
    device = shared.runtime.device.select_device()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if config.fp8 and (reason := config.fp8.obstacle(device.type, capability)):
        mxfp8 = config.fp8.name == "mxfp8"
        given, fix = (
            ("--fp8-recipe mxfp8", "--fp8-recipe blockwise") if mxfp8 else ("--precision fp8", "--precision bf16")
        )
        raise UserError(f"{given}: {reason}; give {fix}")


def model_dtype(config: TrainingConfig) -> torch.dtype:
    """Of weights and activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _train(
    run: Run, backend: Backend, directory: SharedRunDirectory, stop: StopRequest, stack: contextlib.ExitStack
) -> int | None:
    """Train in an open run directory. Returns the last update if a signal stopped the run before its end.

    `stack`: closes what is opened here.
    """
    config, architecture = run.config, run.inputs.architecture
    device = shared.runtime.device.select_device()
    progress.at("opening the data", long=True)
    # Runs of the first version have a table, and do not say so.
    order: Order = run.order if directory.resumed is None else directory.facts.get("data_order", "permutation")
    stored, validation = run.datasets(order)
    training = ReadAhead(stored, ahead=config.global_batch_size, pin=device.type == "cuda")
    stack.callback(training.close)
    progress.at("building the model", long=True)
    if "mla_up_proj" in config.recompute:
        compile_share_storage()
    chunks = gpt.build(
        architecture,
        config.parallel,
        dtype=model_dtype(config),
        recompute=config.recompute,
        backend=backend,
        **model_overrides(config),
    )
    by_te = isinstance(backend, TEBackend)
    if config.fp8 and by_te:
        check_sizes(chunks, config.fp8, tokens=config.tokens_per_rank)
    progress.at("loading", long=True)
    resumed = None if directory.resumed is None else directory.path / iteration_name(directory.resumed)
    base = run.inputs.source.iteration_path
    whole = base if config.lora is not None else resumed or base  # an iteration of LoRA has adapters only
    run.storage.read_weights(chunks, whole, run.inputs.source.path)
    trainable_of(config, architecture).apply(chunks)
    if config.lora is not None and resumed is not None:
        weights.load_adapters(chunks, resumed)
    elif run.inputs.adapter is not None:
        lora.fill(chunks, run.inputs.adapter.tensors())
    model = wrap(chunks, overlap=config.overlap)
    optimizer = build_optimizer(config, model)
    step = 0
    if resumed is not None:
        step = state.load(resumed, model, optimizer, fp8=config.fp8)
        log(f"resuming after update {step} of {config.steps}")

    schedule = config.learning_rates()
    earlier = samples_before(config, directory)
    if resumed is not None:
        fp8_update.announce_switch(directory.facts.get("fp8"), config.fp8, by_te=by_te)
    recorder = run.storage.recorder(
        *(run.config, run.inputs, directory),
        blend=run.blend,
        order=order,
        track=run.track,
        replies=run.replies is not None,
    )
    stack.callback(recorder.close)
    best = Best.of(directory.facts)
    if config.keep_best and best and best.iteration and not on_rank_0(partial(is_kept, directory.path, best.iteration)):
        best = None  # it was noted by a run without --keep-best

    def validated(best: Best | None) -> Best | None:
        result = validate(config, model, validation, device)
        recorder.validated(step, result, run.bytes_per_token)
        return after(best, loss=result.mean, targets=result.targets, iteration=step) if result else None

    def replied(replies: Replies) -> None:
        progress.at("replies to prompts", long=True)
        recorder.replied(step, greedy(model, replies))

    if step == 0:
        best = validated(best)
        if run.replies:
            replied(run.replies)
    first_update = True
    with Saver(config, directory, recorder, model, optimizer, device) as saver:
        while step < config.steps:
            progress.update(step + 1)
            started = time.perf_counter()
            loss = forward_backward(config, model, training, earlier + step * config.global_batch_size, device)
            if not math.isfinite(loss.mean):
                saver.finish()  # on every rank: all have the same loss
                raise StageError(
                    f"the loss of update {step + 1} is {loss.mean}; {recorder.last_saved()}; lower --learning-rate"
                )
            balance = take_balance(config, model, device)
            progress.at("optimizer")
            rate = schedule.learning_rate(step + 1)
            set_learning_rate(optimizer, rate)
            stop.ask(device)  # answered with the gradient's norm: the host need not wait for the update of the weights
            _, gradient_norm, _ = optimizer.step()
            fp8 = fp8_update.end_update(model, device) if isinstance(backend, Fp8Backend) else None
            if fp8 and fp8.not_finite:  # clamped to the largest FP8 number, they leave the loss finite
                saver.finish()
                raise StageError(f"update {step + 1}: {fp8.not_finite}; {recorder.last_saved()}; lower --learning-rate")
            if not math.isfinite(gradient_norm):
                saver.finish()
                raise StageError(
                    f"the gradient of update {step + 1} is {gradient_norm}; {recorder.last_saved()}; lower --learning-rate"
                )
            if first_update:
                recorder.holds(held_bytes(model, optimizer))
                first_update = False
            step += 1
            seconds = time.perf_counter() - started
            progress.updated(seconds)
            progress.at("recording")
            recorder.updated(step, loss, rate, gradient_norm, seconds, balance, fp8)
            saver.poll()

            finished, stopping = step == config.steps, stop.answer()
            if finished or (config.validate_every and step % config.validate_every == 0):
                best = validated(best)
            if config.early_stop and best and best.since >= config.early_stop and not finished:
                finished = True
                log(f"stopped early: no lower validation loss in {best.since} validations (--early-stop)")
            if run.replies and run.replies.due(step, finished=finished):
                replied(run.replies)
            improved = config.keep_best and best is not None and best.iteration == step
            noted = best if config.keep_best or config.early_stop else None
            if finished or stopping or improved or step % config.save_every == 0:
                saver.save(step, finished=finished, last=finished or stopping, best=noted)
            if finished:
                recorder.ended(best)
                return None
            if stopping:
                return step
    return None


def is_kept(directory: Path, iteration: int) -> bool:
    """Whether a run directory has this iteration."""
    return (directory / iteration_name(iteration)).is_dir()


def backend_of(config: TrainingConfig, architecture: Architecture) -> tuple[Backend, str]:
    """The implementation of layers, and a line that says why. UserError for a named one that cannot be used."""
    return choose_backend(
        "local" if config.lora else config.backend,  # modules of TransformerEngine join norm and linear layer
        architecture,
        device_type=shared.runtime.device.select_device().type,
        attention_backend=config.attention_backend,
        fp8=config.fp8,
        pipeline=config.parallel.pipeline,
        adapters=config.lora is not None,
    )


def trainable_of(config: TrainingConfig, architecture: Architecture) -> Trainable:
    """All weights, or LoRA adapters. With `mtp_loss_scaling_factor` 0 the MTP layers are frozen, and not run."""
    if config.lora is not None:
        return Lora(config.lora, config.seed)
    return Frozen(("mtp.*",), given=False) if architecture.mtp and not config.mtp_loss_scaling_factor else FULL


def model_overrides(config: TrainingConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig for training."""
    return {
        "calculate_per_token_loss": True,  # losses are sums over tokens: see loss.py
        # The interleaved schedule sends activations and gradients at the same time. With PP 2 both go to the same rank:
        # batched sends would mix them up.
        "overlap_p2p_comm": config.parallel.virtual_pipeline > 1,
        "batch_p2p_comm": config.parallel.virtual_pipeline == 1,
        "moe_router_bias_update_rate": config.moe_router_bias_update_rate,
    }


def forward_backward(
    config: TrainingConfig, model: list[DistributedDataParallel], data: Dataset, first: int, device: torch.device
) -> Loss:
    """Compute the gradients of the global batch from sample `first` on. Returns its loss."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    batches = [
        data.batch(
            batch_positions(
                first=first,
                micro_batch=index,
                micro_batch_size=config.micro_batch_size,
                rank=rank,
                ranks=ranks,
            )
        )
        for index in range(config.micro_batches)
    ]
    progress.at("forward and backward")

    def micro_batches() -> Iterator[Batch]:
        return (batch.to(device) for batch in batches)

    if model[0].module.architecture.moe:
        scale = balancing_scale([batch.labels for batch in batches], device)
        for chunk in model:
            chunk.config.moe_grad_scale_func = lambda: scale
    for chunk in model:
        chunk.zero_grad_buffer()
    reports = run_schedule(config, model, micro_batches, config.micro_batches, forward_only=False)
    return global_loss(reports, device)


@torch.no_grad()
def validate(
    config: TrainingConfig, model: list[DistributedDataParallel], data: Dataset | None, device: torch.device
) -> Loss | None:
    """Loss over the validation sequences, each read once; None without a validation split."""
    if data is None:
        return None
    progress.at("validation")
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    wanted = min(len(data), config.validation_sequences)
    number = -(-wanted // (config.micro_batch_size * ranks))
    number = -(-number // config.parallel.pipeline) * config.parallel.pipeline  # the interleaved schedule's rule

    def micro_batches() -> Iterator[Batch]:
        for index in range(number):
            positions = np.arange(config.micro_batch_size) + (index * ranks + rank) * config.micro_batch_size
            batch = data.batch(np.minimum(positions, wanted - 1))
            batch.labels[torch.from_numpy(positions >= wanted)] = IGNORE  # padding of the last micro batches
            yield batch.to(device)

    for chunk in model:
        chunk.eval()
    reports = run_schedule(config, model, micro_batches, number, forward_only=True)
    for chunk in model:
        chunk.train()
    return global_loss(reports, device)


def run_schedule(
    config: TrainingConfig,
    model: list[DistributedDataParallel],
    micro_batches: Callable[[], Iterator[Batch]],
    number: int,
    *,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Run this rank's micro batches through Megatron-Core's pipeline schedule."""
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, mtp_loss_scaling_factor=config.mtp_loss_scaling_factor),
        # With VPP each model chunk has its own iterator over the same micro batches.
        data_iterator=[micro_batches() for _ in model] if len(model) > 1 else micro_batches(),
        model=model if len(model) > 1 else model[0],
        num_microbatches=number,
        seq_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )


def forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel, *, mtp_loss_scaling_factor: float
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Forward pass of a micro batch through one model chunk.

    The last stage returns losses `[batch, sequence]`, with an MTP loss `[1 + MTP layers, batch, sequence]`; with context
    parallelism of this rank's part of the sequence.
    """
    progress.beat()
    batch = next(batches)
    depth, labels = model.module.architecture.mtp_depth, batch.labels
    if depth and mtp_loss_scaling_factor:
        labels = mtp_labels(labels, batch.segments, depth)
    padding = batch.padding if model.module.architecture.moe else None
    rows, length = batch.tokens.shape
    positions = torch.arange(length, device=batch.tokens.device).expand(rows, length)
    labels = local_part(labels)  # after mtp_labels, which looks at the next tokens of the row
    output = model(
        input_ids=local_part(batch.tokens),
        position_ids=local_part(positions),
        attention_mask=batch.segments,
        padding_mask=None if padding is None else local_part(padding),
        labels=labels,
    )
    return output, partial(token_loss, labels=labels, mtp_loss_scaling_factor=mtp_loss_scaling_factor)
