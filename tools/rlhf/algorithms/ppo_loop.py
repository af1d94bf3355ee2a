"""The PPO loop: roll-out, scores, experience, clipped updates.

InstructGPT's recipe (arXiv:2203.02155), as in DeepSpeed-Chat (arXiv:2308.01320): policy (actor) and critic are trained; the
KL penalty is relative to the reference policy, a frozen copy. Models are `Engine`s; replies come from a `Sampler`. Random
choices are functions of seed, iteration and rank: resuming needs no generator state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.console import log
from shared.errors import Interrupted, StageError
from shared.report.metrics import peak_memory
from shared.runtime.agreement import on_rank_0
from shared.runtime.stop_request import StopRequest
from shared.training.schedule import Schedule
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import Experience, collect, policy_log_probs, reply_values
from tools.rlhf.data import Prompt
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.engine import Engine
from tools.rlhf.options import PPOOptions
from tools.rlhf.rewards.weighted_sum import Reward
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap
from tools.rlhf.rollout.publisher import Publisher
from tools.rlhf.rollout.sampler import Sampler, rollout_seed
from tools.rlhf.state import State

_KL_HORIZON = 10.0  # iterations; K_beta = 0.1 of arXiv:1909.08593


@dataclass(frozen=True, kw_only=True)
class PPO:
    """A PPO run."""

    options: PPOOptions
    prompts: Sequence[Prompt]
    actor: Engine
    critic: Engine
    reference: Any
    """The reference policy; called like an engine."""
    reward: Reward
    sampler: Sampler
    publisher: Publisher
    state: State
    distributed: DistributedContext
    log_prob_gap_limit: float = math.inf
    """Largest mean gap of an iteration between sampler and trainer, nats."""

    def train(self) -> None:
        """Train to the last iteration; resumes from a saved state.

        Raises:
            Interrupted: stopped by a signal, after saving the state.
            StageError: a metric is not finite, or the sampler's distribution is not the trainer's; the last saved state is kept.
        """
        options, distributed = self.options, self.distributed
        stop = StopRequest()
        first, kl_coefficient = self._resume()
        resumed = first - 1 if first > 1 else None
        metrics = self.state.metrics(resumed, options.track) if distributed.rank == 0 else None
        critic_rate = options.learning_rate if options.critic_learning_rate is None else options.critic_learning_rate
        for step in range(first, options.steps + 1):
            started = time.perf_counter()
            learning_rate = _rate(options, options.learning_rate, step)
            self.actor.set_learning_rate(learning_rate)
            self.critic.set_learning_rate(_rate(options, critic_rate, step))
            experience, row = self._experience(step, kl_coefficient)
            check_log_prob_gap(row["log_prob_gap"], self.log_prob_gap_limit, first=step == first)
            collected = time.perf_counter()
            row |= self._update(experience, step)
            now = time.perf_counter()
            row |= {
                "kl_coefficient": kl_coefficient,
                "learning_rate": learning_rate,
                "seconds": now - started,
                "seconds_update": now - collected,
                "peak_memory_bytes": peak_memory(),
            }
            _check_finite(step, row)
            if options.kl_target is not None:
                kl_coefficient = losses.adapt_kl_coefficient(
                    kl_coefficient, row["kl_reply"], options.kl_target, _KL_HORIZON
                )
            if metrics is not None:
                metrics.append(step=step, **row)
            if step % options.log_every == 0 or step == options.steps:
                log(_line(step, options.steps, row, self.reward.names))
            stopping = stop.agreed(distributed.device) and step < options.steps
            if stopping or step % options.save_every == 0 or step == options.steps:
                if metrics is not None:
                    metrics.sync()
                self._save(step, kl_coefficient)
            if stopping:
                raise Interrupted(
                    f"stopped by a signal after iteration {step} of {options.steps}; run the same command to resume"
                )
        if metrics is not None:
            metrics.close()

    def _experience(self, step: int, kl_coefficient: float) -> tuple[Experience, dict[str, float]]:
        """Publish, roll out, score, evaluate."""
        started = time.perf_counter()
        self.publisher.publish(self.actor, step - 1)
        prompts = self._prompts(step)
        rollout = self.sampler.sample(prompts, seed=rollout_seed(self.options.seed, step, self.distributed.rank))
        sampled = time.perf_counter()
        scores, components = self.reward(rollout.prompts, rollout.replies)
        experience, row = collect(
            rollout,
            scores,
            self.options,
            kl_coefficient=kl_coefficient,
            actor=self.actor,
            critic=self.critic,
            reference=self.reference,
            distributed=self.distributed,
        )
        rewards = {"reward": scores} | {f"reward/{name}": values for name, values in components.items()}
        means = {name: self._mean(values) for name, values in rewards.items()}
        if math.isnan(means["reward"]):
            raise StageError(f"no reward function had an opinion on a reply of iteration {step}; nothing is published")
        row = {name: mean for name, mean in means.items() if not math.isnan(mean)} | row
        row["reward_deviation"] = math.sqrt(self._mean((scores.double() - row["reward"]) ** 2))
        row["seconds_rollout"] = sampled - started
        return experience, row

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """Several epochs of clipped updates over shuffled mini-batches. Returns metrics, averaged over the updates.

        A mini-batch's loss is the mean over its tokens on all ranks: each micro-batch's sum is divided by the mini-batch's
        token count, of the policy without the tokens of weight 0. The gradient is invariant to micro-batch size and number of
        ranks.
        """
        options, distributed = self.options, self.distributed
        sequences, device = experience.sequences, experience.log_probs.device
        rows = len(experience.log_probs)
        updates = options.rollout_batch_size // options.global_batch_size
        generator = torch.Generator().manual_seed(rollout_seed(options.seed, step, distributed.rank))
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        norms: list[float] = []
        for _ in range(options.epochs):
            for mini_batch in torch.randperm(rows, generator=generator).to(device).split(rows // updates):
                tokens = distributed.sum(sequences.reply_mask[mini_batch].sum())
                kept = distributed.sum((experience.weights[mini_batch] > 0).sum().float()).clamp(min=1)
                for index, part in sequences.micro_batches(mini_batch, options.micro_batch_size):
                    mask = part.reply_mask
                    old = (index, slice(mask.shape[1]))
                    loss, clipped = losses.policy_loss(
                        policy_log_probs(self.actor, part, options.temperature),
                        experience.log_probs[old], experience.advantages[old], experience.weights[old], options.clip_range, kept,
                    )  # fmt: skip
                    self.actor.backward(loss)
                    value_loss, value_clipped = losses.value_loss(
                        reply_values(self.critic, part),
                        experience.values[old], experience.returns[old], mask, options.value_clip_range, tokens,
                    )  # fmt: skip
                    self.critic.backward(value_loss)
                    totals += torch.stack([loss, value_loss, clipped / kept, value_clipped / tokens]).detach()
                self.actor.step()
                self.critic.step()
                if (norm := self.actor.gradient_norm()) is not None:
                    norms.append(norm)
        totals = distributed.sum(totals) / (options.epochs * updates)
        names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction")
        row = dict(zip(names, totals.tolist(), strict=True))
        return row | ({"gradient_norm": sum(norms) / len(norms)} if norms else {})

    def _prompts(self, step: int) -> list[Prompt]:
        """This rank's prompts of an iteration; the file is reshuffled for each pass."""
        begin = (step - 1) * self.options.rollout_batch_size
        order = _order(len(self.prompts), self.options.seed, begin, begin + self.options.rollout_batch_size)
        world = self.distributed
        return [self.prompts[i] for place, i in enumerate(order) if place % world.world_size == world.rank]

    def _mean(self, values: Tensor) -> float:
        """Mean over the values of all ranks that are not NaN; NaN without any."""
        values = values.to(self.distributed.device, torch.float64)
        total, count = self.distributed.sum(torch.stack([values.nansum(), (~values.isnan()).double().sum()]))
        return (total / count).item()

    def _save(self, step: int, kl_coefficient: float) -> None:
        place = self.state.begin(step)
        self.actor.save(place / "actor")
        self.critic.save(place / "critic")
        self.distributed.barrier()
        if self.distributed.rank == 0:
            self.state.commit(step, {"kl_coefficient": kl_coefficient})
        self.distributed.barrier()

    def _resume(self) -> tuple[int, float]:
        """The next iteration and its KL coefficient."""
        step = on_rank_0(self.state.create)
        if step is None:
            return 1, self.options.kl_coefficient
        place = self.state.step_path(step)
        self.actor.load(place / "actor")
        self.critic.load(place / "critic")
        log(f"resuming after iteration {step}")
        return step + 1, self.state.facts(step)["kl_coefficient"]


def _order(count: int, seed: int, begin: int, end: int) -> Iterator[int]:
    for epoch in range(begin // count, (end - 1) // count + 1):
        generator = torch.Generator().manual_seed(rollout_seed(seed, epoch, -1))
        order = torch.randperm(count, generator=generator).tolist()
        yield from order[max(begin - epoch * count, 0) : end - epoch * count]


def _rate(options: PPOOptions, peak: float, step: int) -> float:
    schedule = Schedule(
        name="constant", peak=peak, minimum=peak, steps=options.steps, warmup_steps=options.warmup_steps, decay_steps=0
    )
    return schedule.learning_rate(step)


def _check_finite(step: int, row: dict[str, float]) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise StageError(
                f"{name} is {value} at iteration {step}; nothing is published and the state of the last save is kept. "
                "Lower --learning-rate or raise --kl-coefficient"
            )


def _line(step: int, steps: int, row: dict[str, float], names: Sequence[str]) -> str:
    parts = [f"reward {row['reward']:.4f}"]
    parts += [f"{name} {row[f'reward/{name}']:.4f}" for name in names if len(names) > 1 and f"reward/{name}" in row]
    parts += [f"KL {row['kl_reply']:.3f}", f"gap {row['log_prob_gap']:.1e}", f"entropy {row['entropy']:.3f}"]
    parts += [f"clipped {row['clip_fraction']:.3f}", f"value loss {row['value_loss']:.4f}"]
    parts += [f"explained {row['explained_variance']:.2f}", f"{row['reply_tokens']:.1f} tokens"]
    return f"iteration {step}/{steps}: {', '.join(parts)}, {row['seconds']:.1f} s"
