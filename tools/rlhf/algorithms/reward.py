"""`rlhf reward`: a reward model from preference pairs, by TRL's RewardTrainer (Bradley-Terry loss)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from shared.checkpoint.directory.publish import Publication
from shared.console import log
from tools.rlhf.calibration import calibration, figures
from tools.rlhf.data import Pair, read_preferences
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.engines.trl import StageCallback, TrainedPolicy, common_arguments, resume_point, train
from tools.rlhf.held_out import HeldOut, hold_out, whole_micro_batches
from tools.rlhf.lora import HEAD_WEIGHT, Adapters, held_dtype, log_adapters
from tools.rlhf.memory_plan import log_memory, trained_by_accelerate
from tools.rlhf.models import Source, open_source
from tools.rlhf.options import RewardOptions
from tools.rlhf.padding import with_padding_token
from tools.rlhf.published_directory import log_aside, save_hf
from tools.rlhf.published_policy import lora_facts, write_adapter
from tools.rlhf.rewards.reward_model import score
from tools.rlhf.run_context import RunContext, open_training
from tools.rlhf.transformers_model import load_transformers_model


def run(options: RewardOptions) -> None:
    """Train and publish a reward model; report its accuracy on held-out pairs before and after training."""
    distributed = initialize_distributed()
    with open_training(options, distributed) as context:
        opened = open_source(options.source, classifier=True)
        own_padding = opened.tokenizer.pad_token
        source = with_padding_token(opened)
        adapters = Adapters.open(options, source, classifier=True)
        pairs = _split(options, source, distributed.world_size)
        model = new_reward_model(
            source, options.seed, held_dtype(options.precision_on(distributed.device.type), adapters)
        )
        _print_plan(options, source, pairs, distributed)
        before = accuracy(margins(model, pairs.validation, options.micro_batch_size, distributed))
        if before is not None:
            log(f"accuracy on held-out pairs before training: {before:.3f}")
        weights, updates = _train(options, source, pairs, model, context, distributed, adapters)
        if context.out is not None:
            trained = _with_weights(source, options.seed, weights, adapters)
            measured = margins(trained, pairs.validation, options.micro_batch_size, distributed)
            after = accuracy(measured)
            counts = {"pairs": len(pairs.train), "held_out": len(pairs.validation), "dropped": pairs.dropped_rows}
            result = {"accuracy_before": before, "accuracy_after": after, **counts}
            calibrated = calibration(measured) if measured else None
            if after is not None:
                log(f"accuracy on held-out pairs after training: {after:.3f}")
            if source.tokenizer.pad_token != own_padding:
                source.tokenizer.save_pretrained(context.out.path)
            facts = _publish(context.out, trained.to("cpu"), source, weights, adapters, options)
            facts |= result | {"updates": updates}
            facts |= calibrated.facts if calibrated else {}
            context.out.describe(**facts)
            pictures = figures(calibrated) if calibrated else []
            context.add_report(
                title=f"Reward model {options.target.name}", facts=facts, charts=_CHARTS, figures=pictures
            )
            print(json.dumps(result), flush=True)
        distributed.barrier()


_CHARTS = {"Loss": ("loss",), "Accuracy on training pairs": ("accuracy",), "Margin": ("margin",)}


def _split(options: RewardOptions, source: Source, world_size: int) -> HeldOut[Pair]:
    """The pairs of `--data`; UserError if too few training pairs remain."""
    length = options.length_within(source.context_length)
    pairs, dropped = read_preferences(options.data, source.tokenizer, max_length=length)
    split = hold_out(pairs, options, dropped={f"longer than {length} tokens": dropped}, what="pairs")
    return split if world_size == 1 else whole_micro_batches(split, options.micro_batch_size, world_size)


def _publish(
    out: Publication,
    trained: Any,
    source: Source,
    weights: dict[str, Tensor],
    adapters: Adapters | None,
    options: RewardOptions,
) -> dict[str, Any]:
    """Write what the command publishes; returns facts of the manifest."""
    if adapters is None:
        return save_hf(trained, out.path, source, classifier=True)
    tensors = adapters.tensors(trained, weights)
    if options.publish != "merged":
        return write_adapter(out.path, adapters, tensors, target=options.target)
    plain = new_reward_model(source, options.seed)
    plain.score.load_state_dict({"weight": tensors[HEAD_WEIGHT]})
    facts = save_hf(plain, out.path, source, classifier=True, replaced=adapters.merged(tensors))
    return facts | lora_facts(adapters)


def new_reward_model(source: Source, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The source's body with a new one-label head; `source` is opened for a classifier."""
    torch.manual_seed(seed)
    model = load_transformers_model(
        source.kind,
        source.path,
        place=f"--source {source.path}",
        other_head=True,
        num_labels=1,
        dtype=dtype,
    )
    for config in (model.config, model.config.get_text_config()):  # one object, unless the model reads images too
        config.pad_token_id = source.pad_id
    return model


def _print_plan(options: RewardOptions, source: Source, pairs: HeldOut[Pair], distributed: DistributedContext) -> None:
    longest = max(max(len(pair.chosen), len(pair.rejected)) for pair in pairs.train)
    updates = options.updates(len(pairs.train))
    log(f"model     {source.path}, context {source.context_length}")
    log_aside(source)
    log(
        f"pairs     {len(pairs.train)} to train on, {len(pairs.validation)} held out, {pairs.dropped_rows} dropped "
        f"({', '.join(f'{count} as {reason}' for reason, count in pairs.dropped.items())}); "
        f"the longest sequence has {longest} tokens"
    )
    log(f"training  {updates} updates of {options.global_batch_size} pairs, {options.epochs:g} epoch(s)")
    log(
        f"machine   {distributed.world_size} process(es) on {distributed.device.type}, ZeRO stage {options.zero}, "
        f"{options.precision_on(distributed.device.type)}"
    )


def accuracy(measured: list[float]) -> float | None:
    """Share of pairs with score(chosen) > score(rejected); None without pairs."""
    return sum(margin > 0 for margin in measured) / len(measured) if measured else None


def margins(model: Any, pairs: list[Pair], batch_size: int, distributed: DistributedContext) -> list[float]:
    """score(chosen) - score(rejected) of each pair, in any order."""
    model.to(distributed.device)
    found: list[float] = []
    # Sorted by length, to reduce padding.
    ordered = sorted(pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        sequences = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        chosen, rejected = score(model, sequences, model.config.pad_token_id, distributed.device).chunk(2)
        found += (chosen.double() - rejected.double()).tolist()
    return found


def _train(
    options: RewardOptions,
    source: Source,
    pairs: HeldOut[Pair],
    model: Any,
    context: RunContext,
    distributed: DistributedContext,
    adapters: Adapters | None,
) -> tuple[dict[str, Tensor], int]:
    """The trained weights (on rank 0) and the updates made."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    resumed = resume_point(context)
    if options.gradient_checkpointing:
        recompute_layers(model)
    arguments = RewardConfig(
        **common_arguments(context, options, distributed),
        num_train_epochs=options.epochs,
        max_length=None,  # longer pairs are dropped already
        eval_strategy="no",
    )
    rows = [{"chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected)} for pair in pairs.train]
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=source.tokenizer,
        peft_config=adapters and adapters.config(),
    )
    if adapters is not None:
        log_adapters(adapters, trainer.model)
    bf16 = options.precision_on(distributed.device.type) == "bf16"
    states = trained_by_accelerate("model", trainer.model, options, bf16=bf16, world_size=distributed.world_size)
    log_memory([states], offload=options.offload, zero=options.zero)
    callback = StageCallback(
        context,
        options,
        distributed,
        resumed=resumed,
        line=lambda row: f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.3f}, margin {row['margin']:.3f}",
    )
    updates = train(trainer, callback, resumed)
    return TrainedPolicy(trainer).full_weights(), updates


def _with_weights(source: Source, seed: int, weights: dict[str, Tensor], adapters: Adapters | None) -> Any:
    """A whole model of the trained weights: those of a trained one may be sharded."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model = new_reward_model(source, seed)
    if adapters is not None:
        model = adapters.attach(model, seed)
    model.load_state_dict(weights, strict=False)  # a tied tensor is there once
    return model.eval()
