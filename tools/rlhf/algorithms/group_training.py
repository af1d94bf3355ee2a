"""What `rlhf grpo` and `rlhf rloo` share: several replies to a prompt, advantages relative to each other, TRL's trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shared.console import log
from shared.errors import UserError
from shared.precision import DTYPES
from shared.runtime import progress
from tools.rlhf.data import Prompt
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.held_out_callback import HeldOutCallback
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.engines.trl import StageCallback, TrainedPolicy, common_arguments, resume_point, step_of, train
from tools.rlhf.held_out_prompts import CHARTS, HeldOutPrompts, read_held_out
from tools.rlhf.lora import Adapters, held_dtype, log_adapters
from tools.rlhf.memory_plan import frozen, log_memory, trained_by_accelerate
from tools.rlhf.models import Source, keep_in_evaluation_mode, load_policy, open_policy
from tools.rlhf.options import GroupOptions
from tools.rlhf.published_directory import log_aside
from tools.rlhf.published_policy import publish_policy
from tools.rlhf.rewards import weighted_sum
from tools.rlhf.rewards.spec import RewardSpec
from tools.rlhf.rollout.in_process import policy_sampler
from tools.rlhf.rollout.log_prob_gap import log_prob_gap_limit
from tools.rlhf.rollout.on_servers import ServerSampler, log_sampler, server_sampler
from tools.rlhf.rollout.publisher import InProcessPublisher
from tools.rlhf.rollout.rollout import Reply
from tools.rlhf.run_context import RunContext, open_training
from tools.rlhf.transformers_model import base_of


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What one algorithm adds to the common run."""

    name: str
    """In titles."""
    trainer: Any
    """A class of `engines.group_trainers`."""
    config: Callable[..., Any]
    """Its arguments' class, called with the common arguments and `settings`."""
    settings: Mapping[str, Any]
    plan: str
    """The line of the plan that names the loss."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer."""


def train_and_publish(options: GroupOptions, make: Callable[[], Algorithm]) -> None:
    """Train and publish a policy; `make` is called after the process group is there."""
    distributed = initialize_distributed()
    with open_training(options, distributed) as context:
        source, prompts = open_policy(options)
        adapters = Adapters.open(options, source)
        held_out = read_held_out(options, source, prompts)
        _check_prompts(prompts, options)
        reward = weighted_sum.load(
            options.rewards,
            source.tokenizer,
            prompts,
            device=distributed.device,
            dtype=getattr(torch, DTYPES[options.precision_on(distributed.device.type)]),
            batch_size=options.micro_batch_size,
            timeout=options.reward_timeout,
        )
        algorithm = make()
        with server_sampler(options, source, prompts, distributed, adapters) as servers:
            _print_plan(options, algorithm, source, prompts, distributed, servers)
            trained, weights, updates, evaluated = _train(
                options, algorithm, source, prompts, held_out, reward, context, distributed, servers, adapters
            )
        if context.out is not None:
            facts = publish_policy(context.out, trained, source, weights, adapters, options) | {
                "updates": updates,
                "prompts": len(prompts),
            }
            facts |= evaluated.publish(context) if evaluated else {}
            context.out.describe(**facts)
            context.add_report(
                title=f"{algorithm.name} run {options.target.name}",
                facts=facts,
                charts=_charts(reward) | (CHARTS if evaluated else {}),
                figures=evaluated.figures() if evaluated else (),
            )
        distributed.barrier()


def _charts(reward: weighted_sum.Reward) -> dict[str, tuple[str, ...]]:
    components = tuple(f"rewards/{name}/mean" for name in reward.names)
    return {
        "Reward": ("reward", *(components if len(components) > 1 else ())),
        "Spread of rewards": ("reward_std",),
        "Entropy, nats a token": ("entropy",),
        "Clipped": ("clip_ratio/region_mean", "cispo_clip_ratio"),
        "Gap between roll-out and trainer log-probabilities, nats": ("log_prob_gap", "log_prob_gap_max"),
        "Ratio of trainer to sampler": ("importance_ratio_min", "importance_ratio_max"),
        "Importance correction: mean weight of a token": ("importance_weight",),
        "Importance correction: tokens dropped and capped": ("importance_dropped", "importance_capped"),
        "KL from the source, nats a token": ("kl",),
        "Reply length, tokens": ("completions/mean_length",),
        "Gradient norm": ("grad_norm",),
    }


def _check_prompts(prompts: Sequence[Prompt], options: GroupOptions) -> None:
    groups = options.global_batch_size // options.generations
    if len(prompts) < groups:  # TRL drops an incomplete batch: there would be no update
        raise UserError(
            f"--prompts {options.prompts} has {len(prompts)} prompt(s) and an update takes {groups} (--global-batch-size "
            f"{options.global_batch_size} / --generations {options.generations}); add prompts, lower --global-batch-size "
            "or raise --generations"
        )
    if len({isinstance(prompt.raw, str) for prompt in prompts}) > 1:
        raise UserError(f"--prompts {options.prompts} has texts and messages; TRL takes one kind: use one of them")


def _print_plan(
    options: GroupOptions,
    algorithm: Algorithm,
    source: Source,
    prompts: Sequence[Prompt],
    distributed: DistributedContext,
    servers: ServerSampler | None,
) -> None:
    groups = options.global_batch_size // options.generations
    log(f"policy    {source.path}, context {source.context_length}")
    log_aside(source)
    log(f"reward    {' + '.join(f'{spec.weight:g} * {spec.name}' for spec in options.rewards)}")
    log_sampler(options, servers)
    log(f"prompts   {len(prompts)} used, none dropped")
    log(
        f"update    {groups} prompts with {options.generations} replies each of up to {options.max_new_tokens} tokens; "
        f"{options.steps} updates, {options.epochs} on the same replies"
    )
    log(algorithm.plan)
    log(
        f"machine   {distributed.world_size} process(es) on {distributed.device.type}, ZeRO stage {options.zero}, "
        f"{options.precision_on(distributed.device.type)}"
    )


def _train(
    options: GroupOptions,
    algorithm: Algorithm,
    source: Source,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    reward: weighted_sum.Reward,
    context: RunContext,
    distributed: DistributedContext,
    servers: ServerSampler | None,
    adapters: Adapters | None,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int, HeldOutPrompts | None]:
    """The trained policy, its weights (on rank 0), the updates made and the held-out prompts."""
    from datasets import Dataset

    resumed = resume_point(context)
    precision = options.precision_on(distributed.device.type)
    # Before the arguments: with ZeRO-3 among them transformers would shard it while it is loaded.
    policy = load_policy(source, held_dtype(precision, adapters))
    keep_in_evaluation_mode(policy)
    if options.gradient_checkpointing:
        recompute_layers(policy)
    arguments = algorithm.config(
        **common_arguments(context, options, distributed),
        lr_scheduler_type="constant_with_warmup",
        max_steps=options.steps,
        num_generations=options.generations,
        num_iterations=options.epochs,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
        beta=options.kl_coefficient,
        reward_weights=[spec.weight for spec in options.rewards],
        **algorithm.settings,
    )
    trainer = algorithm.trainer(
        distributed=distributed,
        log_prob_gap_limit=log_prob_gap_limit(
            precision, servers.precision if servers else precision, given=options.log_prob_gap_limit
        ),
        servers=servers,
        rollout_micro_batch_size=options.rollout_micro_batch_size,
        **algorithm.arguments,
        model=policy,
        reward_funcs=[_reward_function(spec, scorer, prompts, source) for spec, scorer in reward.components],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": p.text, "row": row} for row, p in enumerate(prompts)]),
        processing_class=source.tokenizer,
        peft_config=adapters and adapters.config(),
    )
    if adapters is not None:
        log_adapters(adapters, trainer.model)
    if (
        trainer.ref_model is not None and not options.zero
    ):  # TRL loads it as the policy is: float32, with its main weights
        trainer.ref_model.to(getattr(torch, DTYPES[precision]))
    _log_memory(options, trainer, reward, adapters, distributed)
    ids = {prompt.text: list(prompt.ids) for prompt in prompts}
    # TRL's own rendering knows no tools of a row.
    trainer._tokenize_prompts = lambda texts: ([ids[text] for text in texts], None, {})
    callback = StageCallback(context, options, distributed, resumed=resumed, line=_line, period=options.epochs)
    trained = TrainedPolicy(trainer)
    evaluated = None
    if held_out:
        evaluated = HeldOutPrompts(
            held_out,
            options,
            policy=trained,
            publisher=servers.publisher if servers else InProcessPublisher(),
            sampler=servers or policy_sampler(options, source, trained.module, distributed),
            reward=reward,
            source=source,
            adapters=adapters,
            directory=context.state.path,
            distributed=distributed,
        )
        trainer.add_callback(HeldOutCallback(trainer, evaluated, step_of(resumed) if resumed else None))
    updates = train(trainer, callback, resumed)
    return trained.module, trained.full_weights(), updates, evaluated


def _log_memory(
    options: GroupOptions,
    trainer: Any,
    reward: weighted_sum.Reward,
    adapters: Adapters | None,
    distributed: DistributedContext,
) -> None:
    bf16, world_size = options.precision_on(distributed.device.type) == "bf16", distributed.world_size
    states = [trained_by_accelerate("policy", trainer.model, options, bf16=bf16, world_size=world_size)]
    if trainer.ref_model is not None:
        states.append(frozen("reference", base_of(trainer.ref_model), sharded=options.zero == 3, world_size=world_size))
    states += [
        frozen(f"reward {number}", model, sharded=False, world_size=world_size)
        for number, model in enumerate(reward.models, 1)
    ]
    log_memory(states, offload=options.offload, zero=options.zero)


def _line(row: Mapping[str, float]) -> str:
    if "reward" not in row:  # a second update on the same replies
        return f"loss {row['loss']:.4f}, entropy {row['entropy']:.3f}"
    return (
        f"reward {row['reward']:.4f}, spread {row['reward_std']:.4f}, gap {row['log_prob_gap']:.1e}, "
        f"entropy {row['entropy']:.3f}, "
        f"{row['completions/mean_length']:.1f} tokens, {row['step_time']:.1f} s"
    )


def _reward_function(spec: RewardSpec, scorer: weighted_sum.Scorer, prompts: Sequence[Prompt], source: Source) -> Any:
    """A scorer with TRL's signature. It uses the sampled token ids; replies are not tokenised again."""

    def function(*, row: list[int], completion_ids: list[list[int]], **unused: Any) -> list[float]:
        texts = source.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        replies = [
            Reply(ids=tuple(ids), text=text, ended=bool(ids) and ids[-1] in source.eos_ids)
            for ids, text in zip(completion_ids, texts, strict=True)
        ]
        progress.at("rewards", limit=math.inf)  # --reward-timeout
        scores = scorer([prompts[i] for i in row], replies)
        progress.at("forward and backward")
        return scores

    function.__name__ = spec.name
    return function
