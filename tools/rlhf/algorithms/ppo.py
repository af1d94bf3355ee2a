"""`rlhf ppo`: proximal policy optimisation of a language model on DeepSpeed engines.

The recipe of InstructGPT (arXiv:2203.02155) and DeepSpeed-Chat (arXiv:2308.01320): a policy (actor) and a critic are trained,
a frozen copy of the policy (reference) holds it near where it began, rewards score whole replies. Every random choice
is a function of the seed, the iteration and the rank, so a resumed run needs no generator state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.checkpoint.directory.open import open_checkpoint
from shared.console import log
from shared.errors import Interrupted, StageError, UserError
from shared.precision import DTYPES, TrainingPrecision
from shared.report.metrics import Metrics, peak_memory
from shared.runtime.agreement import on_first_rank
from shared.runtime.stop_request import StopRequest
from shared.training.schedule import Schedule
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import Experience, Recipe, collect, policy_log_probs, reply_values
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.engines.deepspeed import (
    EngineOptions,
    frozen_engine,
    full_weights,
    prepare,
    train_engine,
)
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.models import Source, load_critic, load_policy, open_source, save_hf
from tools.rlhf.options import PPOOptions
from tools.rlhf.rewards import weighted_sum
from tools.rlhf.rollout.in_process import sample
from tools.rlhf.run_context import RunContext, check_batches, open_run

_KL_HORIZON = 10.0  # iterations; K_beta = 0.1 of arXiv:1909.08593


@dataclass(frozen=True, kw_only=True)
class Models:
    """The four models of PPO."""

    actor: Any
    critic: Any
    reference: Any
    reward: weighted_sum.Reward


def run(options: PPOOptions) -> None:
    """Train, save state on the way, publish the policy."""
    distributed = prepare()
    _check(options, distributed)
    with open_run(options.target, options.inputs, overwrite=options.overwrite) as context:
        source = open_source(options.source)
        prompts = read_prompts(
            options.prompts, source.tokenizer, context=source.context, max_new_tokens=options.max_new_tokens
        )
        models, precision = _build(options, source, distributed)
        _print_plan(options, source, prompts, models, precision, distributed)
        _train(options, source, prompts, models, context, distributed)
        weights = full_weights(models.actor, distributed)
        if context.out is not None:
            facts = save_hf(models.actor.module, context.out.path, source, weights=weights)
            facts |= {"iterations": options.steps, "prompts": len(prompts), "precision": precision}
            context.out.describe(**facts)
            context.add_report(title=f"PPO run {options.target.name}", facts=facts, charts=_charts(models.reward))
        distributed.barrier()


def _charts(reward: weighted_sum.Reward) -> dict[str, tuple[str, ...]]:
    components = tuple(f"reward/{name}" for name in reward.names)
    return {
        "Reward": ("reward", *(components if len(components) > 1 else ())),
        "KL from the reference, nats a reply": ("kl_reply",),
        "Entropy, nats a token": ("entropy",),
        "Clipped": ("clip_fraction", "value_clip_fraction"),
        "Value loss": ("value_loss",),
        "Gradient norm of the policy": ("gradient_norm",),
        "Explained variance of the returns": ("explained_variance",),
        "Reply length, tokens": ("reply_tokens",),
        "Gap between roll-out and trainer log-probabilities, nats": ("log_prob_gap", "log_prob_gap_max"),
        "Time of an iteration, s": ("seconds", "seconds_rollout", "seconds_update"),
    }


def _check(options: PPOOptions, distributed: DistributedContext) -> None:
    """UserError for batch sizes that do not divide each other."""
    check_batches(
        global_batch_size=options.global_batch_size, micro_batch_size=options.micro_batch_size, distributed=distributed
    )
    if options.rollout_batch_size % options.global_batch_size:
        raise UserError(
            f"--rollout-batch-size {options.rollout_batch_size} is not a multiple of --global-batch-size "
            f"{options.global_batch_size}"
        )


def _build(options: PPOOptions, source: Source, distributed: DistributedContext) -> tuple[Models, TrainingPrecision]:
    precision = options.precision_on(distributed.device.type)
    dtype = getattr(torch, DTYPES[precision])
    engine = EngineOptions(
        zero=options.zero,
        precision=precision,
        micro_batch_size=options.micro_batch_size,
        accumulation=options.global_batch_size // (options.micro_batch_size * distributed.world_size),
        max_gradient_norm=options.max_gradient_norm,
    )
    # Rewards first: a function that does not load is found before minutes of loading models.
    reward = weighted_sum.load(
        options.rewards,
        source.tokenizer,
        device=distributed.device,
        dtype=dtype,
        batch_size=options.micro_batch_size,
        wrap=lambda model: frozen_engine(model, engine),
    )
    if options.critic is not None:
        open_checkpoint(options.critic, kinds=("hf",), flag="--critic")
    critic = load_critic(options.critic_path, dtype, vocab_size=source.config.vocab_size)
    models = Models(
        actor=train_engine(load_policy(source, dtype), engine, learning_rate=options.learning_rate),
        critic=train_engine(critic, engine, learning_rate=options.learning_rate),
        reference=frozen_engine(load_policy(source, dtype), engine),
        reward=reward,
    )
    return models, precision


def _print_plan(
    options: PPOOptions,
    source: Source,
    prompts: Sequence[Prompt],
    models: Models,
    precision: TrainingPrecision,
    distributed: DistributedContext,
) -> None:
    replies = options.steps * options.rollout_batch_size
    log(f"policy    {source.path} ({type(models.actor.module).__name__}, context {source.context})")
    log(f"critic    from {options.critic_path}")
    log(f"reward    {' + '.join(f'{spec.weight:g} * {spec.name}' for spec in options.rewards)}")
    log(f"prompts   {len(prompts)} used, none dropped; {replies / len(prompts):.1f} replies to each over the run")
    log(
        f"iteration {options.rollout_batch_size} replies of up to {options.max_new_tokens} tokens, then "
        f"{options.epochs * options.rollout_batch_size // options.global_batch_size} updates of "
        f"{options.global_batch_size} replies; {options.steps} iterations"
    )
    log(
        f"machine   {distributed.world_size} process(es) on {distributed.device.type}, ZeRO stage {options.zero}, {precision}"
    )


def _train(
    options: PPOOptions,
    source: Source,
    prompts: Sequence[Prompt],
    models: Models,
    context: RunContext,
    distributed: DistributedContext,
) -> None:
    stop = StopRequest()
    first, kl_coefficient = _resume(options, models, context, distributed)
    metrics = (
        Metrics(context.state.path, resumed_step=first - 1 if first > 1 else None) if distributed.rank == 0 else None
    )
    critic_rate = options.learning_rate if options.critic_learning_rate is None else options.critic_learning_rate
    for step in range(first, options.steps + 1):
        started = time.perf_counter()
        actor_rate, critic_rate_now = (_rate(options, peak, step) for peak in (options.learning_rate, critic_rate))
        _set_rate(models.actor, actor_rate)
        _set_rate(models.critic, critic_rate_now)
        experience, row = _experience(options, source, prompts, models, step, kl_coefficient, distributed)
        collected = time.perf_counter()
        row |= update(models.actor, models.critic, experience, options, step, distributed)
        now = time.perf_counter()
        row |= {
            "kl_coefficient": kl_coefficient,
            "learning_rate": actor_rate,
            "seconds": now - started,
            "seconds_update": now - collected,
            "peak_memory_bytes": peak_memory(),
        }
        _refuse_nan(step, row)
        if options.kl_target is not None:
            kl_coefficient = losses.adapt_kl_coefficient(
                kl_coefficient, row["kl_reply"], options.kl_target, _KL_HORIZON
            )
        if metrics is not None:
            metrics.append(step=step, **row)
        if step % options.log_every == 0 or step == options.steps:
            log(_line(step, options.steps, row, models.reward.names))
        stopping = stop.agreed(distributed.device) and step < options.steps
        if stopping or step % options.save_every == 0 or step == options.steps:
            if metrics is not None:
                metrics.sync()
            _save(models, context, step, kl_coefficient, distributed)
        if stopping:
            raise Interrupted(
                f"stopped by a signal after iteration {step} of {options.steps}; run the same command to go on"
            )
    if metrics is not None:
        metrics.close()


def _experience(
    options: PPOOptions,
    source: Source,
    prompts: Sequence[Prompt],
    models: Models,
    step: int,
    kl_coefficient: float,
    distributed: DistributedContext,
) -> tuple[Experience, dict[str, float]]:
    """Roll out, score, evaluate."""
    torch.manual_seed(_seed(options.seed, step, distributed.rank))
    started = time.perf_counter()
    rollout = sample(
        models.actor.module,
        _draw(prompts, options, step, distributed),
        source.tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        eos_ids=source.eos_ids,
        pad_id=source.pad_id,
        in_step=options.zero == 3 and distributed.world_size > 1,
    )
    sampled = time.perf_counter()
    scores, components = models.reward(rollout.prompts, rollout.replies)
    recipe = Recipe(
        temperature=options.temperature,
        kl_estimator=options.kl_estimator,
        kl_coefficient=kl_coefficient,
        missing_eos_penalty=options.missing_eos_penalty,
        discount=options.discount,
        gae_lambda=options.gae_lambda,
        whiten_advantages=options.whiten_advantages,
        micro_batch_size=options.micro_batch_size,
    )
    experience, row = collect(
        rollout,
        scores,
        recipe,
        actor=models.actor,
        critic=models.critic,
        reference=models.reference,
        distributed=distributed,
    )
    rewarded = {"reward": scores} | {f"reward/{name}": values for name, values in components.items()}
    row = {name: _mean(values, distributed) for name, values in rewarded.items()} | row
    spread = (scores.double() - row["reward"]) ** 2
    row["reward_deviation"] = math.sqrt(_mean(spread, distributed))
    row["seconds_rollout"] = sampled - started
    return experience, row


def update(
    actor: Any, critic: Any, experience: Experience, options: PPOOptions, step: int, distributed: DistributedContext
) -> dict[str, float]:
    """Several epochs of clipped updates over shuffled mini-batches; returns metrics, averaged over the updates.

    A mini-batch's loss is the mean over its tokens on all ranks: every micro-batch's sum is divided by the mini-batch's
    token count, so neither the micro-batch size nor the number of ranks changes the gradient. DeepSpeed averages over
    micro-batches and ranks, which `scale` undoes.
    """
    sequences, device = experience.sequences, experience.log_probs.device
    rows = len(experience.log_probs)
    updates = options.rollout_batch_size // options.global_batch_size
    micro_batches = rows // updates // options.micro_batch_size
    scale = micro_batches * distributed.world_size
    generator = torch.Generator().manual_seed(_seed(options.seed, step, distributed.rank))
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    norms: list[float] = []
    for _ in range(options.epochs):
        for chosen in torch.randperm(rows, generator=generator).to(device).split(rows // updates):
            tokens = distributed.sum(sequences.reply_mask[chosen].sum())
            for index, part in sequences.micro_batches(chosen, options.micro_batch_size):
                mask = part.reply_mask
                old = (index, slice(mask.shape[1]))
                log_probs = policy_log_probs(actor, part, options.temperature)
                loss, clipped = losses.policy_loss(
                    log_probs, experience.log_probs[old], experience.advantages[old], mask, options.clip_range, tokens
                )
                actor.backward(loss * scale)
                actor.step()
                values = reply_values(critic, part)
                critic_loss, critic_clipped = losses.value_loss(
                    values, experience.values[old], experience.returns[old], mask, options.value_clip_range, tokens
                )
                critic.backward(critic_loss * scale)
                critic.step()
                totals += torch.stack([loss, critic_loss, clipped / tokens, critic_clipped / tokens]).detach()
            # DeepSpeed knows the norm of all but plain float32 (stage 0).
            if (norm := actor.get_global_grad_norm()) is not None:
                norms.append(float(norm))
    totals = distributed.sum(totals) / (options.epochs * updates)
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction")
    row = dict(zip(names, totals.tolist(), strict=True))
    return row | ({"gradient_norm": sum(norms) / len(norms)} if norms else {})


def _draw(prompts: Sequence[Prompt], options: PPOOptions, step: int, distributed: DistributedContext) -> list[Prompt]:
    """This rank's prompts of an iteration: the file in a new shuffled order each time it is used up."""
    begin = (step - 1) * options.rollout_batch_size
    order = _order(len(prompts), options.seed, begin, begin + options.rollout_batch_size)
    return [prompts[i] for place, i in enumerate(order) if place % distributed.world_size == distributed.rank]


def _order(count: int, seed: int, begin: int, end: int) -> Iterator[int]:
    for epoch in range(begin // count, (end - 1) // count + 1):
        generator = torch.Generator().manual_seed(_seed(seed, epoch, -1))
        order = torch.randperm(count, generator=generator).tolist()
        yield from order[max(begin - epoch * count, 0) : end - epoch * count]


def _seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each use, spread by a multiplicative hash."""
    return (seed * 1_000_003 + step) * 1_000_003 + rank + 1


def _mean(values: Tensor, distributed: DistributedContext) -> float:
    values = values.to(distributed.device, torch.float64)
    return losses.masked_mean(values, torch.ones_like(values), distributed.sum).item()


def _rate(options: PPOOptions, peak: float, step: int) -> float:
    schedule = Schedule(
        name="constant", peak=peak, minimum=peak, steps=options.steps, warmup_steps=options.warmup_steps, decay_steps=0
    )
    return schedule.learning_rate(step)


def _set_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _refuse_nan(step: int, row: dict[str, float]) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise StageError(
                f"{name} is {value} at iteration {step}; nothing is published and the state of the last save is kept. "
                "Lower --learning-rate or raise --kl-coefficient"
            )


def _line(step: int, steps: int, row: dict[str, float], names: Sequence[str]) -> str:
    parts = [f"reward {row['reward']:.4f}"]
    parts += [f"{name} {row[f'reward/{name}']:.4f}" for name in names if len(names) > 1]
    parts += [f"KL {row['kl_reply']:.3f}", f"gap {row['log_prob_gap']:.1e}", f"entropy {row['entropy']:.3f}"]
    parts += [f"clipped {row['clip_fraction']:.3f}", f"value loss {row['value_loss']:.4f}"]
    parts += [f"explained {row['explained_variance']:.2f}", f"{row['reply_tokens']:.1f} tokens"]
    return f"iteration {step}/{steps}: {', '.join(parts)}, {row['seconds']:.1f} s"


def _save(
    models: Models, context: RunContext, step: int, kl_coefficient: float, distributed: DistributedContext
) -> None:
    place = context.state.begin(step)
    for name, engine in (("actor", models.actor), ("critic", models.critic)):
        engine.save_checkpoint(str(place), tag=name, save_latest=False)
    distributed.barrier()
    if context.out is not None:
        context.state.commit(step, {"kl_coefficient": kl_coefficient})
    distributed.barrier()


def _resume(
    options: PPOOptions, models: Models, context: RunContext, distributed: DistributedContext
) -> tuple[int, float]:
    """The first iteration to run and its KL coefficient."""
    step = on_first_rank(context.state.create)
    if step is None:
        return 1, options.kl_coefficient
    for name, engine in (("actor", models.actor), ("critic", models.critic)):
        engine.load_checkpoint(str(context.state.of_step(step)), tag=name)
    log(f"resuming after iteration {step}")
    return step + 1, context.state.facts(step)["kl_coefficient"]
