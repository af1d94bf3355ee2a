"""The `rlhf` command: reward models and GRPO on TRL, PPO on DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import ExistingDir, ExistingFile, NonNegative, Positive, Tool

tool = Tool("rlhf", summary="Train a reward model, and a policy on rewards, from and to Hugging Face directories.")

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]


@tool.command(neutral=("save_every", "log_every"))
def reward(
    source: ExistingDir,
    data: ExistingFile,
    target: Path,
    overwrite: bool = False,
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    epochs: Above = 1.0,
    global_batch_size: Positive = 32,
    micro_batch_size: Positive = 8,
    sequence_length: Positive | None = None,
    learning_rate: Rate = 1e-5,
    warmup_steps: NonNegative = 0,
    max_gradient_norm: Above = 1.0,
    precision: Literal["bf16", "fp32"] | None = None,
    processes: Positive = 1,
    seed: NonNegative = 0,
    save_every: Positive = 100,
    log_every: Positive = 10,
) -> int | None:
    """Train a reward model on preference pairs, with TRL's RewardTrainer.

    Reads a Hugging Face causal language model and JSON lines of {"prompt", "chosen", "rejected"}; publishes a Hugging
    Face directory of a sequence-classification model with one label, and prints its accuracy on held-out pairs before
    and after training. Killed or stopped, the same command goes on from TARGET.state.

    Args:
        source: the Hugging Face directory of the model to start from.
        data: preference pairs, one JSON object a line; a prompt may be a text or a list of messages.
        target: the directory to publish.
        overwrite: replace what is published at the target.
        validation_fraction: share of the pairs held out of training.
        epochs: passes over the training pairs.
        global_batch_size: pairs an update, over all processes.
        micro_batch_size: pairs a forward pass of one process.
        sequence_length: tokens a prompt with its reply may have, longer pairs are dropped and counted; by default the
            model's context.
        learning_rate: of AdamW, falling linearly to 0 after the warm-up.
        warmup_steps: updates over which the rate rises from 0.
        max_gradient_norm: gradients are scaled down to this norm.
        precision: of the arithmetic; by default bf16 on a GPU and fp32 elsewhere. Weights train in fp32.
        processes: worker processes on this machine, one a GPU where there are GPUs.
        seed: of the held-out choice, the head's first weights and the order of pairs.
        save_every: updates between two saves of the state.
        log_every: updates between two log lines; metrics.jsonl has every update.
    """
    from shared.training.launch import launch

    code = launch(processes)
    if code is not None:
        return code
    from tools.rlhf.reward import RewardOptions, run

    run(
        RewardOptions(
            source=source,
            data=data,
            target=target,
            overwrite=overwrite,
            validation_fraction=validation_fraction,
            epochs=epochs,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            max_gradient_norm=max_gradient_norm,
            precision=precision,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
        )
    )
    return None


@tool.command(neutral=("save_every", "log_every"))
def ppo(
    source: ExistingDir,
    prompts: ExistingFile,
    reward: str,
    target: Path,
    overwrite: bool = False,
    critic: ExistingDir | None = None,
    steps: Positive = 100,
    rollout_batch_size: Positive = 64,
    global_batch_size: Positive = 32,
    micro_batch_size: Positive = 8,
    epochs: Positive = 2,
    max_new_tokens: Positive = 128,
    temperature: Above = 1.0,
    learning_rate: Rate = 1e-5,
    critic_learning_rate: Rate | None = None,
    warmup_steps: NonNegative = 0,
    kl_coefficient: Rate = 0.05,
    kl_estimator: Literal["k1", "k3"] = "k1",
    kl_target: Above | None = None,
    clip_range: Above = 0.2,
    value_clip_range: Above = 0.2,
    discount: Fraction = 1.0,
    gae_lambda: Fraction = 0.95,
    whiten_advantages: bool = True,
    missing_eos_penalty: Rate = 0.0,
    max_gradient_norm: Above = 1.0,
    zero: Annotated[int, Field(ge=0, le=3)] = 0,
    precision: Literal["bf16", "fp32"] | None = None,
    processes: Positive = 1,
    seed: NonNegative = 0,
    save_every: Positive = 10,
    log_every: Positive = 1,
) -> int | None:
    """Train a policy on rewards by PPO, on DeepSpeed engines.

    Reads a Hugging Face causal language model and JSON lines of {"prompt"} or {"messages"}; publishes a Hugging Face
    directory of the trained policy. Killed or stopped, the same command goes on from TARGET.state.

    Args:
        source: the Hugging Face directory of the policy to start from; frozen, it is also the reference of the KL penalty.
        prompts: one JSON object a line; other columns are handed to reward functions.
        reward: model:DIR (of `rlhf reward`) or py:FILE:FUNCTION, weighted and added up as in 0.5*model:DIR,py:FILE:f.
        target: the directory to publish.
        overwrite: replace what is published at the target.
        critic: where the critic starts; by default the first reward model, else the policy.
        steps: iterations of roll-out and update.
        rollout_batch_size: replies an iteration, over all processes.
        global_batch_size: replies an update, over all processes.
        micro_batch_size: replies a forward pass of one process.
        epochs: passes over the replies of an iteration.
        max_new_tokens: tokens a reply may have.
        temperature: of sampling, and of the distribution that is trained.
        learning_rate: of the policy's AdamW, constant after the warm-up.
        critic_learning_rate: of the critic's; by default the policy's.
        warmup_steps: iterations over which both rates rise from 0.
        kl_coefficient: weight of the KL penalty on every token; the first one if --kl-target is given.
        kl_estimator: k1 is log(policy / reference); k3 has the same mean, less variance and is never negative.
        kl_target: nats of KL a reply that the coefficient is adapted to; by default the coefficient stays.
        clip_range: how far the policy's probability ratio counts from 1.
        value_clip_range: how far a new value counts from the old one.
        discount: gamma of the returns.
        gae_lambda: lambda of generalized advantage estimation.
        whiten_advantages: scale advantages to mean 0 and variance 1 over the iteration's tokens.
        missing_eos_penalty: taken from the reward of a reply that does not end within --max-new-tokens.
        max_gradient_norm: gradients are scaled down to this norm.
        zero: ZeRO stage: 1 shards the optimizer's state over processes, 2 gradients too, 3 parameters too.
        precision: of weights and activations; by default bf16 on a GPU and fp32 elsewhere.
        processes: worker processes on this machine, one a GPU where there are GPUs.
        seed: of sampling and of every order.
        save_every: iterations between two saves of the state.
        log_every: iterations between two log lines; metrics.jsonl has every iteration.
    """
    from tools.rlhf.reward_spec import parse

    components = parse(reward)
    from shared.training.launch import launch

    code = launch(processes)
    if code is not None:
        return code
    from tools.rlhf.ppo import PPOOptions, run

    run(
        PPOOptions(
            source=source,
            prompts=prompts,
            reward=components,
            target=target,
            overwrite=overwrite,
            critic=critic,
            steps=steps,
            rollout_batch_size=rollout_batch_size,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            epochs=epochs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            learning_rate=learning_rate,
            critic_learning_rate=critic_learning_rate,
            warmup_steps=warmup_steps,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
            kl_target=kl_target,
            clip_range=clip_range,
            value_clip_range=value_clip_range,
            discount=discount,
            gae_lambda=gae_lambda,
            whiten_advantages=whiten_advantages,
            missing_eos_penalty=missing_eos_penalty,
            max_gradient_norm=max_gradient_norm,
            zero=zero,
            precision=precision,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
        )
    )
    return None


@tool.command(neutral=("save_every", "log_every"))
def grpo(
    source: ExistingDir,
    prompts: ExistingFile,
    reward: str,
    target: Path,
    overwrite: bool = False,
    steps: Positive = 100,
    generations: Annotated[int, Field(ge=2)] = 8,
    global_batch_size: Positive = 64,
    micro_batch_size: Positive = 8,
    epochs: Positive = 1,
    max_new_tokens: Positive = 128,
    temperature: Above = 1.0,
    learning_rate: Rate = 1e-5,
    warmup_steps: NonNegative = 0,
    kl_coefficient: Rate = 0.0,
    clip_range: Above = 0.2,
    max_gradient_norm: Above = 1.0,
    precision: Literal["bf16", "fp32"] | None = None,
    processes: Positive = 1,
    seed: NonNegative = 0,
    save_every: Positive = 10,
    log_every: Positive = 1,
) -> int | None:
    """Train a policy on rewards by GRPO, with TRL's GRPOTrainer: no critic, replies to one prompt are compared.

    Reads and publishes what `rlhf ppo` does. Killed or stopped, the same command goes on from TARGET.state.

    Args:
        source: the Hugging Face directory of the policy to start from.
        prompts: one JSON object a line; other columns are handed to reward functions.
        reward: model:DIR (of `rlhf reward`) or py:FILE:FUNCTION, weighted and added up as in 0.5*model:DIR,py:FILE:f.
        target: the directory to publish.
        overwrite: replace what is published at the target.
        steps: updates.
        generations: replies to one prompt, which are compared with each other.
        global_batch_size: replies an update, over all processes: a multiple of --generations.
        micro_batch_size: replies a forward pass of one process.
        epochs: updates on the same replies.
        max_new_tokens: tokens a reply may have.
        temperature: of sampling, and of the distribution that is trained.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: updates over which the rate rises from 0.
        kl_coefficient: weight of the KL divergence from the source in the loss; 0 needs no reference model.
        clip_range: how far the policy's probability ratio counts from 1.
        max_gradient_norm: gradients are scaled down to this norm.
        precision: of the arithmetic; by default bf16 on a GPU and fp32 elsewhere. Weights train in fp32.
        processes: worker processes on this machine, one a GPU where there are GPUs.
        seed: of sampling and of the order of prompts.
        save_every: updates between two saves of the state.
        log_every: updates between two log lines; metrics.jsonl has every update.
    """
    from tools.rlhf.reward_spec import parse

    components = parse(reward)
    from shared.training.launch import launch

    code = launch(processes)
    if code is not None:
        return code
    from tools.rlhf.grpo import GRPOOptions, run

    run(
        GRPOOptions(
            source=source,
            prompts=prompts,
            reward=components,
            target=target,
            overwrite=overwrite,
            steps=steps,
            generations=generations,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            epochs=epochs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            kl_coefficient=kl_coefficient,
            clip_range=clip_range,
            max_gradient_norm=max_gradient_norm,
            precision=precision,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
        )
    )
    return None


def main() -> None:
    """The console script."""
    tool.run()
