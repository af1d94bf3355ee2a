"""Common part of `pretrain train` and `sft train`: options, plan, checks, workers, loop.

Checks and the start of workers need no torch import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from shared.checkpoint.directory.manifest import parents_of, read_manifest, run_fingerprint
from shared.checkpoint.directory.target import check_target
from shared.console import log
from shared.errors import StageError, UserError
from shared.invocation import invocation
from shared.kernels.fp8.recipes import AMAX_HISTORY, Fp8Recipe
from shared.mapping.adapters import LoraSettings
from shared.model.backend_choice import check_backend
from shared.model.support import check_supported
from shared.parallel import ParallelConfig, ranks_needed
from shared.precision import DTYPES
from shared.report.track import check_installed
from shared.runtime import progress
from shared.runtime.launch import launch, visible_gpus
from shared.runtime.silence_warnings import silence
from shared.training import rehearsal_options
from shared.training.blend import Blend
from shared.training.config import (
    MOE_ROUTER_BIAS_UPDATE_RATE,
    TrainingConfig,
    default_decay_steps,
    default_micro_batch_size,
    default_warmup_steps,
)
from shared.training.data_sources import DataSource
from shared.training.lora_options import lora_settings, mtp_loss_scaling_factor, weight_decay
from shared.training.options import EXTENDABLE, TrainingOptions
from shared.training.plan import Inputs, announce, default_processes
from shared.training.replies import Replies
from shared.training.samplers import Order, default_order

if TYPE_CHECKING:
    from shared.training.data import Dataset


def plan(
    options: TrainingOptions, *, steps: int, sequence_length: int, adapter: LoraSettings | None = None
) -> TrainingConfig:
    """The configuration, every default resolved. UserError names the flag to change.

    `adapter`: settings of `options.adapter`.
    """
    lora = lora_settings(options, adapter)
    if options.offload_optimizer and options.async_save:
        raise UserError(
            "--offload-optimizer and --async-save exclude each other: updates change the moments in pinned memory, which a fork "
            "of the process does not copy; leave one out"
        )
    parallel = parallel_config(options)
    decay = default_decay_steps(steps) if options.decay_steps is None else options.decay_steps
    if options.decay_steps is not None and options.schedule != "wsd":
        raise UserError(f"--decay-steps belongs to --schedule wsd, not {options.schedule}")
    if options.min_learning_rate is not None and options.schedule == "constant":
        raise UserError(
            "--min-learning-rate belongs to --schedule cosine or wsd; a constant rate stays --learning-rate"
        )
    return TrainingConfig(
        steps=steps,
        sequence_length=sequence_length,
        micro_batch_size=options.micro_batch_size
        or default_micro_batch_size(options.global_batch_size, parallel.data, sequence_length),
        global_batch_size=options.global_batch_size,
        learning_rate=options.learning_rate,
        min_learning_rate=options.learning_rate / 10
        if options.min_learning_rate is None
        else options.min_learning_rate,
        schedule=options.schedule,
        warmup_steps=default_warmup_steps(steps) if options.warmup_steps is None else options.warmup_steps,
        decay_steps=decay,
        weight_decay=weight_decay(options),
        mtp_loss_scaling_factor=mtp_loss_scaling_factor(options),
        moe_router_bias_update_rate=MOE_ROUTER_BIAS_UPDATE_RATE
        if options.moe_router_bias_update_rate is None
        else options.moe_router_bias_update_rate,
        clip_grad=options.clip_grad,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        seed=options.seed,
        precision="fp32" if options.precision == "fp32" else "bf16",
        fp8=fp8_recipe(options),
        recompute=options.recompute,
        backend=options.backend,
        attention_backend=options.attention_backend,
        parallel=parallel,
        overlap=options.overlap,
        offload_optimizer=options.offload_optimizer,
        lora=lora,
        save_every=options.save_every,
        keep=options.keep,
        async_save=options.async_save,
        log_every=options.log_every,
        validate_every=max(steps // 10, 1) if options.validate_every is None else options.validate_every,
        validation_sequences=options.validation_sequences,
        keep_best=options.keep_best,
        early_stop=options.early_stop,
    )


def fp8_recipe(options: TrainingOptions) -> Fp8Recipe | None:
    """The FP8 recipe of the options; None without FP8. UserError for an option that would do nothing."""
    given = {
        "--fp8-recipe": options.fp8_recipe,
        "--fp8-format": options.fp8_format,
        "--fp8-amax-history": options.fp8_amax_history,
        "--fp8-bf16-layers": options.fp8_bf16_layers,
    }
    if options.precision != "fp8":
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag} belongs to --precision fp8, not {options.precision}")
        return None
    name = options.fp8_recipe or "tensorwise"
    if options.fp8_amax_history is not None and name != "delayed":
        raise UserError(f"--fp8-amax-history belongs to --fp8-recipe delayed, not {name}")
    return Fp8Recipe(
        name=name,
        format=options.fp8_format or ("e4m3" if name in ("blockwise", "mxfp8") else "hybrid"),
        amax_history=options.fp8_amax_history or AMAX_HISTORY,
        power_of_two_scales=name == "blockwise",  # as TransformerEngine
        bf16_layers=options.fp8_bf16_layers or (1, 1),
    )


def parallel_config(options: TrainingOptions) -> ParallelConfig:
    """The parallel layout of the options."""
    needed = ranks_needed(
        tensor=options.tensor_parallel,
        pipeline=options.pipeline_parallel,
        context=options.context_parallel,
        expert=options.expert_parallel,
        expert_tensor=options.expert_tensor_parallel,
    )
    try:
        return ParallelConfig(
            processes=rehearsal_options.world(options, needed) or options.processes or default_processes(needed),
            tensor=options.tensor_parallel,
            pipeline=options.pipeline_parallel,
            virtual_pipeline=options.virtual_pipeline,
            pipeline_layers=options.pipeline_layers,
            sequence_parallel=options.sequence_parallel,
            context=options.context_parallel,
            context_exchange=options.context_parallel_exchange,
            expert=options.expert_parallel,
            expert_tensor=options.expert_tensor_parallel,
        )
    except UserError as error:
        if options.world is None:
            raise
        raise UserError(str(error).replace("--processes", "--world")) from None  # the flag that was given


def blend(options: TrainingOptions, inputs: Inputs, sequences: Sequence[int]) -> Blend:
    """The blend of the sources; `sequences`: of the training split of each. UserError for weights that do not fit."""
    weights = options.data_weights
    if weights is not None and (len(weights) != len(inputs.data) or len(weights) == 1):
        raise UserError(
            f"--data-weights has {len(weights)} number{'s' * (len(weights) > 1)} and --data {len(inputs.data)}; give one for "
            "each of several datasets"
        )
    return Blend.of([source.name for source in inputs.data], sequences, weights)


def validation(options: TrainingOptions, inputs: Inputs, splits: Mapping[str, Dataset]) -> Dataset | None:
    """Validation splits, by name of their source, as one dataset in which each is read once, with the shares of training."""
    from shared.training.data import blended

    if not splits:
        return None
    shares = dict(zip([source.name for source in inputs.data], options.data_weights or (), strict=False))
    weights = [shares[name] for name in splits] if shares else None
    return blended(Blend.of(list(splits), [len(split) for split in splits.values()], weights), list(splits.values()))


def run(
    options: TrainingOptions,
    config: TrainingConfig,
    inputs: Inputs,
    *,
    blend: Blend,
    items: int,
    datasets: Callable[[Order], tuple[Dataset, Dataset | None]],
    packed: bool,
    bytes_per_token: float | None = None,
    notes: Sequence[str] = (),
    replies: Replies | None = None,
) -> int | None:
    """Print the plan and train in `config.parallel.processes` processes.

    Returns the exit code of the workers; None in a worker or with one process.

    Args:
        options: as given; paths are read from them.
        config: the plan.
        inputs: the opened input directories.
        blend: the sources of the training split and their shares.
        items: documents or sequences of the largest source, whichever are more.
        datasets: opens the training and the validation split in an order of samples; called in the workers.
        packed: whether rows have several segments.
        bytes_per_token: UTF-8 bytes per token of the validation split; None if the dataset does not record it.
        notes: further lines of the plan.
        replies: the prompts that are answered during the run.
    """
    check_supported(inputs.architecture)
    config.check_model(inputs.architecture)
    if options.mtp_loss_scaling_factor is not None and not inputs.architecture.mtp:
        raise UserError(
            "--mtp-loss-scaling-factor belongs to models with MTP (multi-token prediction) layers, "
            f"and the model of --source {options.source} has none; leave it out"
        )
    moe = inputs.architecture.moe
    if options.moe_router_bias_update_rate is not None and not (moe and moe.correction_bias):
        raise UserError(
            "--moe-router-bias-update-rate belongs to MoE models whose router has a correction bias (DeepSeek V3, GLM-4.5), "
            f"and the model of --source {options.source} has none; leave it out"
        )
    check_validation(options, inputs)
    check_installed(options.track)
    gpu = rehearsal_options.gpu(options)
    if gpu is not None:
        config = rehearsal_options.enter(config, gpu)
    else:
        check_backend(options.backend, gpus=visible_gpus())
        if options.offload_optimizer and not visible_gpus():
            raise UserError(
                "--offload-optimizer moves AdamW's moments from a GPU to the host, and there is no GPU; leave it out"
            )
        _leave_if_done(options, config, inputs)
        inputs.verify()
        code = launch(config.parallel.processes)
        if code is not None:
            return code
    announce(config, inputs, blend)
    for line in notes:
        log(line)
    without = [source.name for source in inputs.data if not has_validation(source)]
    if len(without) == len(inputs.data):
        log("validation  none: the data has no validation split")
    elif without:
        log(f"validation  without {', '.join(without)}, which has no validation split")
    silence()
    if gpu is not None:
        from shared.rehearsal import fake_world

        fake_world.before_forking()
        from shared.training import rehearse
    else:
        progress.begin(options.hang_timeout)
    from shared.training import loop  # torch and Megatron-Core, in the workers only

    run = loop.Run(
        config=config,
        inputs=inputs,
        target=options.target,
        overwrite=options.overwrite,
        extend=options.extend,
        blend=blend,
        order=default_order(items),
        datasets=datasets,
        packed=packed,
        bytes_per_token=bytes_per_token,
        track=options.track,
        replies=None if gpu is not None else replies,  # not rehearsed
    )
    if gpu is not None:
        nodes = rehearsal_options.nodes(options, config.parallel.processes)
        rehearse.rehearse(run, gpu, all_ranks=options.all_ranks, nodes=nodes)
        return None
    try:
        loop.train(run)
    except (OSError, StageError) as error:
        if options.target.is_dir():
            raise
        raise StageError(f"--target {options.target} was removed or renamed during the run") from error
    finally:
        progress.end()
    return None


def has_validation(source: DataSource) -> bool:
    """Whether a dataset has a validation split with a loss."""
    split = source.splits.get("validation")
    return split is not None and bool(split.get("target_tokens", 1))


def check_validation(options: TrainingOptions, inputs: Inputs) -> None:
    """UserError for an option that needs validations, where none would be made."""
    given = {
        "--validate-every": bool(options.validate_every),
        "--keep-best": options.keep_best,
        "--early-stop": options.early_stop is not None,
    }
    flag = next((flag for flag, value in given.items() if value), None)
    if flag and not any(map(has_validation, inputs.data)):
        raise UserError(
            f"{flag}: --data {', '.join(str(source.path) for source in inputs.data)} has no validation split; prepare it with "
            f"--validation-fraction 0.05, or leave {flag} out"
        )
    if options.validate_every == 0 and flag:
        raise UserError(f"{flag} needs validations during the run, and --validate-every is 0; leave one out")


def _leave_if_done(options: TrainingOptions, config: TrainingConfig, inputs: Inputs) -> None:
    """Raise AlreadyDone for a finished run of the same fingerprint, before workers start."""
    manifest = read_manifest(options.target, flag="--target")
    if manifest is None:
        return
    parents = parents_of(inputs.parents)
    fingerprint = run_fingerprint(invocation(), inputs.parents, parents)
    dtype = manifest.facts.get("dtype", DTYPES[config.precision])
    if options.extend and dtype != DTYPES[config.precision]:
        given = next(name for name, of in DTYPES.items() if of == dtype)
        raise UserError(
            f"--target {options.target} has {given} weights, and --extend does not change them; give --precision {given}"
            + " or fp8" * (given == "bf16")
        )
    if options.extend and manifest.identity != fingerprint:
        if (manifest.iteration or 0) >= config.steps:
            raise UserError(
                f"--target {options.target} has {manifest.iteration} updates; --extend needs more --steps than that, not "
                f"{config.steps}"
            )
        return
    replaced = options.overwrite and manifest.state == "finished"
    trained = manifest.facts.get("micro_batch_size", config.micro_batch_size)
    if manifest.identity == fingerprint and trained != config.micro_batch_size and not (options.extend or replaced):
        raise UserError(
            f"--target {options.target} was trained with --micro-batch-size {trained}, now it is {config.micro_batch_size}; the "
            f"load-balancing loss of its experts is over a micro batch: give --micro-batch-size {trained}, or --extend to go "
            "on with other micro batches"
        )
    if manifest.state != "finished":
        return
    check_target(
        options.target,
        fingerprint=fingerprint,
        parents=parents,
        overwrite=options.overwrite,
        extendable=EXTENDABLE,
    )
