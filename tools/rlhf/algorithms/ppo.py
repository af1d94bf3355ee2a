"""`rlhf ppo`: proximal policy optimisation of a language model on DeepSpeed engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from shared.checkpoint.directory.open import open_checkpoint
from shared.console import log
from shared.precision import DTYPES
from tools.rlhf.algorithms import ppo_trlx
from tools.rlhf.algorithms.ppo_loop import PPO
from tools.rlhf.data import Prompt
from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, frozen_model, initialize_distributed
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.engine import Engine
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.engines.shared_body import BACKWARDS, CriticOfBoth, PolicyOfBoth, PolicyWithValueHead
from tools.rlhf.held_out_prompts import CHARTS, HeldOutPrompts, read_held_out
from tools.rlhf.lora import AdapterOff, Adapters, log_adapters
from tools.rlhf.memory_plan import frozen, log_memory, trained_by_accelerate, trained_by_deepspeed
from tools.rlhf.models import Source, load_critic, load_policy, open_policy
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.pretraining_text import read_pretraining_text
from tools.rlhf.published_directory import log_aside
from tools.rlhf.published_policy import publish_policy
from tools.rlhf.rewards import weighted_sum
from tools.rlhf.rollout.in_process import policy_sampler
from tools.rlhf.rollout.log_prob_gap import log_prob_gap_limit
from tools.rlhf.rollout.on_servers import ServerSampler, log_sampler, server_sampler
from tools.rlhf.rollout.publisher import InProcessPublisher
from tools.rlhf.run_context import open_training
from tools.rlhf.state import State


def run(options: PPOOptions) -> None:
    """Train, with periodic saves, and publish the policy."""
    distributed = initialize_distributed()
    with open_training(options, distributed) as context:
        source, prompts = open_policy(options)
        held_out = read_held_out(options, source, prompts)
        adapters = Adapters.open(options, source)
        with server_sampler(options, source, prompts, distributed, adapters) as servers:
            ppo = _build(options, source, prompts, context.state, distributed, servers, adapters)
            if held_out:
                ppo = replace(ppo, held_out=_held_out(ppo, held_out, source, adapters))
            _print_plan(ppo, source, adapters)
            ppo.train()
        weights = ppo.actor.full_weights()
        if context.out is not None:
            facts = publish_policy(context.out, ppo.actor.module, source, weights, adapters, options)
            precision = options.precision_on(distributed.device.type)
            facts |= {"iterations": options.steps, "prompts": len(prompts), "precision": precision}
            facts |= {"backend": options.backend}
            facts |= ppo.held_out.publish(context) if ppo.held_out else {}
            context.out.describe(**facts)
            context.add_report(
                title=f"PPO run {options.target.name}",
                facts=facts,
                charts=_charts(ppo.reward) | (CHARTS if ppo.held_out else {}),
                figures=ppo.held_out.figures() if ppo.held_out else (),
            )
        distributed.barrier()


def _held_out(ppo: PPO, prompts: Sequence[Prompt], source: Source, adapters: Adapters | None) -> HeldOutPrompts:
    return HeldOutPrompts(
        prompts,
        ppo.options,
        policy=ppo.actor,
        publisher=ppo.publisher,
        sampler=ppo.sampler,
        reward=ppo.reward,
        source=source,
        adapters=adapters,
        directory=ppo.state.path,
        distributed=ppo.distributed,
    )


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
        "Rewards, 10th to 90th percentile": ("reward_p10", "reward_p50", "reward_p90"),
        "Reply length, tokens": ("reply_tokens", "reply_tokens_p10", "reply_tokens_p90"),
        "Gap between roll-out and trainer log-probabilities, nats": ("log_prob_gap", "log_prob_gap_max"),
        "Ratio of trainer to sampler": ("importance_ratio_min", "importance_ratio_max"),
        "Importance correction: mean weight of a token": ("importance_weight",),
        "Importance correction: tokens dropped and capped": ("importance_dropped", "importance_capped"),
        "Time of an iteration, s": ("seconds", "seconds_rollout", "seconds_score", "seconds_forward", "seconds_update"),
    }


def _build(
    options: PPOOptions,
    source: Source,
    prompts: Sequence[Prompt],
    state: State,
    distributed: DistributedContext,
    servers: ServerSampler | None,
    adapters: Adapters | None,
) -> PPO:
    precision = options.precision_on(distributed.device.type)
    dtype = getattr(torch, DTYPES[precision])
    engine = EngineOptions(
        zero=options.zero,
        precision=precision,
        micro_batch_size=options.micro_batch_size,
        accumulation=options.global_batch_size // (options.micro_batch_size * distributed.world_size),
        max_gradient_norm=options.max_gradient_norm,
        offload=options.offload,
    )
    # Rewards first: a broken function fails before the models load, which takes minutes.
    reward = weighted_sum.load(
        options.rewards,
        source.tokenizer,
        prompts,
        device=distributed.device,
        dtype=dtype,
        batch_size=options.micro_batch_size,
        timeout=options.reward_timeout,
        wrap=lambda model: frozen_model(model, engine),
    )
    pretraining = (
        read_pretraining_text(options.pretraining_data, source, options.pretraining_length)
        if options.pretraining_data
        else None
    )
    kind = PPO
    actor: Engine
    critic: Engine
    reference: Any
    if options.backend == "trlx":
        kind, reward = ppo_trlx.TrlxPPO, ppo_trlx.ScoredReplies(reward.components)
        actor, critic, reference = ppo_trlx.models(options, source, distributed, adapters, engine)
    else:
        actor, critic = _trained(options, source, engine, dtype, distributed, adapters)
        reference = frozen_model(load_policy(source, dtype), engine) if adapters is None else AdapterOff(actor)
    return kind(
        options=options,
        prompts=prompts,
        actor=actor,
        critic=critic,
        pretraining=pretraining,
        reference=reference,
        reward=reward,
        sampler=servers or policy_sampler(options, source, actor.module, distributed),
        publisher=servers.publisher if servers else InProcessPublisher(),
        log_prob_gap_limit=log_prob_gap_limit(
            precision, servers.precision if servers else precision, given=options.log_prob_gap_limit
        ),
        state=state,
        distributed=distributed,
    )


def _trained(
    options: PPOOptions,
    source: Source,
    settings: EngineOptions,
    dtype: torch.dtype,
    distributed: DistributedContext,
    adapters: Adapters | None,
) -> tuple[Engine, Engine]:
    """Policy and critic."""
    policy = load_policy(source, dtype)
    if options.gradient_checkpointing:
        recompute_layers(policy)
    if adapters is not None:
        policy = adapters.attach(policy, options.seed)
    if options.shared_critic:
        settings = replace(settings, accumulation=BACKWARDS * settings.accumulation)
        both = DeepSpeedEngine(PolicyWithValueHead(policy), settings, distributed)
        weight = 0.1 if options.value_coefficient is None else options.value_coefficient
        return PolicyOfBoth(both), CriticOfBoth(both, weight)
    if options.critic is not None:
        open_checkpoint(options.critic, kinds=("hf",), flag="--critic")
    critic = load_critic(options.critic_path, dtype, vocab_size=source.vocab_size)
    if options.gradient_checkpointing:
        recompute_layers(critic.body)
    if adapters is not None:
        critic = adapters.attach_to_critic(critic, options.seed)
    return DeepSpeedEngine(policy, settings, distributed), DeepSpeedEngine(critic, settings, distributed)


def _print_plan(ppo: PPO, source: Source, adapters: Adapters | None) -> None:
    options, distributed, prompts = ppo.options, ppo.distributed, len(ppo.prompts)
    replies = options.steps * options.rollout_batch_size
    updates = options.epochs * options.rollout_batch_size // options.global_batch_size
    log(f"policy    {source.path} ({source.kind.__name__}, context {source.context_length})")
    log_aside(source)
    log(f"critic    {_critic(options)}")
    if ppo.pretraining is not None:
        log(f"text      {len(ppo.pretraining)} rows of {ppo.pretraining.length} tokens from {options.pretraining_data}")
    if adapters is not None:
        log_adapters(adapters, ppo.actor.module)
    _log_memory(ppo, adapters)
    log(f"reward    {' + '.join(f'{spec.weight:g} * {spec.name}' for spec in options.rewards)}")
    log_sampler(options, ppo.sampler)
    log(f"prompts   {prompts} used, none dropped; {replies / prompts:.1f} replies to each over the run")
    log(
        f"iteration {options.rollout_batch_size} replies of up to {options.max_new_tokens} tokens, then {updates} updates "
        f"of {options.global_batch_size} replies; {options.steps} iterations"
    )
    log(
        f"machine   {distributed.world_size} process(es) on {distributed.device.type}, ZeRO stage {options.zero}, "
        f"{options.precision_on(distributed.device.type)}"
    )


def _critic(options: PPOOptions) -> str:
    if options.backend == "trlx":
        return "a value head on the policy"
    return "a head on the policy's body" if options.shared_critic else f"from {options.critic_path}"


def _log_memory(ppo: PPO, adapters: Adapters | None) -> None:
    options, world_size = ppo.options, ppo.distributed.world_size
    bf16, sharded = options.precision_on(ppo.distributed.device.type) == "bf16", options.zero == 3
    trained = {"policy": ppo.actor.module, "critic": ppo.critic.module}
    if options.backend == "trlx":
        states = [
            trained_by_accelerate(name, model, options, bf16=bf16, world_size=world_size)
            for name, model in trained.items()
        ]
    else:
        states = [
            trained_by_deepspeed(name, model, bf16=bf16, zero=options.zero, world_size=world_size)
            for name, model in trained.items()
        ]
    others = {} if adapters is not None else {"reference": ppo.reference.module}
    others |= {f"reward {number}": model for number, model in enumerate(ppo.reward.models, 1)}
    states += [frozen(name, model, sharded=sharded, world_size=world_size) for name, model in others.items()]
    log_memory(states, offload=options.offload, zero=options.zero)
