"""What `rlhf dpo` has in common with other training on given replies: rows of token ids in, a published policy out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.console import log
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.engines.trl import StageCallback, TrainedPolicy, common_arguments, resume_point, train
from tools.rlhf.held_out import HeldOut
from tools.rlhf.lora import Adapters, held_dtype, log_adapters
from tools.rlhf.memory_plan import log_memory, trained_by_accelerate
from tools.rlhf.models import Source, keep_in_evaluation_mode, load_policy
from tools.rlhf.options import PreferenceOptions
from tools.rlhf.published_directory import log_aside
from tools.rlhf.published_policy import publish_policy
from tools.rlhf.run_context import RunContext

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What one algorithm adds to the common run."""

    name: str
    """In titles."""
    rows: str
    """What the rows are called."""
    trainer: Any
    """A class of `engines.preference_trainers`."""
    config: Callable[..., Any]
    """Its arguments' class, called with the common arguments and `settings`."""
    settings: Mapping[str, Any]
    line: Callable[[Mapping[str, float]], str]
    """Formats an update's metrics as a log line."""
    charts: Mapping[str, Sequence[str]]
    """Chart title -> metric names, beside those of every algorithm."""
    plan: Sequence[str]
    """Lines of the plan."""


CHARTS = {"Loss": ("loss",), "Implicit rewards": ("rewards/chosen", "rewards/rejected"), "Margin": ("rewards/margins",)}
CHARTS_AFTER = {"Entropy, nats a token": ("entropy",), "Gradient norm": ("grad_norm",)}


def train_and_publish(
    algorithm: Algorithm,
    options: PreferenceOptions,
    source: Source,
    rows: HeldOut[Row],
    context: RunContext,
    distributed: DistributedContext,
) -> None:
    """Train on the rows, measure on those held out, publish the policy, print the result as a line of JSON."""
    from tools.rlhf.engines.preference_trainers import rows_on_disk

    _print_plan(algorithm, options, source, rows, distributed)
    adapters = Adapters.open(options, source)
    resumed = resume_point(context)
    # Before the arguments: with ZeRO-3 among them transformers would shard it while it is loaded.
    policy = load_policy(source, held_dtype(options.precision_on(distributed.device.type), adapters))
    keep_in_evaluation_mode(policy)
    if options.gradient_checkpointing:
        recompute_layers(policy)
    arguments = algorithm.config(
        **common_arguments(context, options, distributed),
        num_train_epochs=options.epochs,
        per_device_eval_batch_size=options.micro_batch_size,
        max_length=None,  # longer rows are dropped already
        eval_strategy="no",
        disable_dropout=False,  # no layer is in training mode
        precompute_ref_log_probs=True,
        **algorithm.settings,
    )
    log(
        f"reference log-probabilities of {len(rows.train) + len(rows.validation)} {algorithm.rows}, before the first update"
    )
    trainer = algorithm.trainer(
        model=policy,
        args=arguments,
        train_dataset=rows_on_disk(rows.train, context.state.path / "rows"),
        eval_dataset=rows_on_disk(rows.validation, context.state.path / "held_out") if rows.validation else None,
        processing_class=source.tokenizer,
        peft_config=adapters and adapters.config(),
    )
    if adapters is not None:
        log_adapters(adapters, trainer.model)
    bf16 = options.precision_on(distributed.device.type) == "bf16"
    states = trained_by_accelerate("policy", trainer.model, options, bf16=bf16, world_size=distributed.world_size)
    log_memory([states], offload=options.offload, zero=options.zero)
    callback = StageCallback(context, options, distributed, resumed=resumed, line=algorithm.line)
    updates = train(trainer, callback, resumed)
    result = {
        **(_measured(trainer) if rows.validation else {}),
        algorithm.rows: len(rows.train),
        "held_out": len(rows.validation),
        "dropped": rows.dropped_rows,
    }
    trained = TrainedPolicy(trainer)
    weights = trained.full_weights()
    if context.out is not None:
        facts = publish_policy(context.out, trained.module, source, weights, adapters, options)
        facts |= result | {"updates": updates}
        context.out.describe(**facts)
        charts = {**CHARTS, **algorithm.charts, **CHARTS_AFTER}
        context.add_report(title=f"{algorithm.name} run {options.target.name}", facts=facts, charts=charts)
        print(json.dumps(result), flush=True)
    distributed.barrier()


def _measured(trainer: Any) -> dict[str, float]:
    """Loss, accuracy and margin on held-out rows, after training; before it they are those of equal policies."""
    found = trainer.evaluate()
    names = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    values = {f"held_out_{name}": found.get(f"eval_{key}", math.nan) for name, key in names.items()}
    for name, value in values.items():
        if math.isfinite(value):
            log(f"{name.replace('_', ' ')} after training: {value:.4f}")
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _print_plan(
    algorithm: Algorithm,
    options: PreferenceOptions,
    source: Source,
    rows: HeldOut[Row],
    distributed: DistributedContext,
) -> None:
    updates = options.updates(len(rows.train))
    dropped = "".join(f", {count} dropped as {reason}" for reason, count in rows.dropped.items())
    log(f"policy    {source.path}, context {source.context_length}")
    log_aside(source)
    log(f"{algorithm.rows:<9} {len(rows.train)} to train on, {len(rows.validation)} held out{dropped}")
    for line in algorithm.plan:
        log(line)
    log(f"training  {updates} updates of {options.global_batch_size} {algorithm.rows}, {options.epochs:g} epoch(s)")
    log(
        f"machine   {distributed.world_size} process(es) on {distributed.device.type}, ZeRO stage {options.zero}, "
        f"{options.precision_on(distributed.device.type)}"
    )
