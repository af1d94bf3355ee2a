"""The PPO loop: roll-out, scores, experience, clipped updates.

InstructGPT's recipe (arXiv:2203.02155), as in DeepSpeed-Chat (arXiv:2308.01320): policy (actor) and critic are trained; the
KL penalty is relative to the reference policy, a frozen copy. Models are `Engine`s; replies come from a `Sampler`. Random
choices are functions of seed, iteration and rank: resuming needs no generator state.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.console import log
from shared.errors import Interrupted, StageError
from shared.report.metrics import peak_memory
from shared.runtime import progress
from shared.runtime.agreement import on_rank_0
from shared.runtime.stop_request import StopRequest
from shared.training.schedule import Schedule
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import Experience, collect, reply_logits, reply_values, text_log_probs
from tools.rlhf.data import Prompt
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.engine import Engine
from tools.rlhf.held_out_prompts import HeldOutPrompts
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.pretraining_text import PretrainingText
from tools.rlhf.quantiles import quantiles
from tools.rlhf.rewards.running_moments import RewardScale
from tools.rlhf.rewards.weighted_sum import Reward
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap
from tools.rlhf.rollout.publisher import InProcessPublisher, Publisher
from tools.rlhf.rollout.rollout import Sequences
from tools.rlhf.rollout.sampler import Sampler, rollout_seed
from tools.rlhf.state import State

_AVERAGED = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl", "pretraining_loss")
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
    pretraining: PretrainingText | None = None
    log_prob_gap_limit: float = math.inf
    """Largest mean gap of an iteration between sampler and trainer, nats."""
    held_out: HeldOutPrompts | None = None
    """Prompts that are answered during the run."""

    def train(self) -> None:
        """Train to the last iteration; resumes from a saved state.

        Raises:
            Interrupted: stopped by a signal, after saving the state.
            StageError: a metric is not finite, or the sampler's distribution is not the trainer's; the last saved state is kept.
        """
        options, distributed = self.options, self.distributed
        stop = StopRequest()
        first, kl_coefficient, scale = self._resume()
        resumed = first - 1 if first > 1 else None
        metrics = self.state.metrics(resumed, options.track) if distributed.rank == 0 else None
        if self.held_out:
            self.held_out.begin(resumed)
        critic_rate = options.learning_rate if options.critic_learning_rate is None else options.critic_learning_rate
        for step in range(first, options.steps + 1):
            started = time.perf_counter()
            progress.update(step)
            learning_rate = _rate(options, options.learning_rate, step)
            self.actor.set_learning_rate(learning_rate)
            self.critic.set_learning_rate(_rate(options, critic_rate, step))
            experience, row = self._experience(step, kl_coefficient, scale)
            check_log_prob_gap(row["log_prob_gap"], self.log_prob_gap_limit, first=step == first)
            collected = time.perf_counter()
            progress.at("update")
            row |= self._update(experience, step)
            now = time.perf_counter()
            progress.updated(now - started)
            progress.at("recording and saving", long=True, limit=math.inf)
            row |= {
                "kl_coefficient": kl_coefficient,
                "learning_rate": learning_rate,
                "seconds": now - started,
                "seconds_update": now - collected,
                "peak_memory_bytes": peak_memory(),
            }
            _check_finite(step, row)
            if self.held_out and self.held_out.due(step):
                row |= self.held_out.evaluate(step)
            if options.kl_target is not None:
                horizon = options.kl_horizon or _KL_HORIZON
                kl_coefficient = losses.adapt_kl_coefficient(
                    kl_coefficient, row["kl_reply"], options.kl_target, horizon
                )
            if metrics is not None:
                metrics.append(step=step, **row)
            if step % options.log_every == 0 or step == options.steps:
                log(_line(step, options.steps, row, self.reward.names))
            stopping = stop.agreed(distributed.device) and step < options.steps
            if stopping or step % options.save_every == 0 or step == options.steps:
                if metrics is not None:
                    metrics.sync()
                self._save(step, kl_coefficient, scale)
            if stopping:
                raise Interrupted(
                    f"stopped by a signal after iteration {step} of {options.steps}; run the same command to resume"
                )
        if metrics is not None:
            metrics.close()

    def _experience(
        self, step: int, kl_coefficient: float, scale: RewardScale | None = None
    ) -> tuple[Experience, dict[str, float]]:
        """Publish, roll out, score, evaluate; `scale`: of the rewards that are learned from."""
        started = time.perf_counter()
        own_limit = (
            None if isinstance(self.publisher, InProcessPublisher) else math.inf
        )  # servers have --rollout-timeout
        progress.at("roll-out", limit=own_limit)
        self.publisher.publish(self.actor, step - 1)
        published = time.perf_counter()
        prompts = self._prompts(step)
        rollout = self.sampler.sample(prompts, seed=rollout_seed(self.options.seed, step, self.distributed.rank))
        sampled = time.perf_counter()
        progress.at("rewards", limit=math.inf)  # --reward-timeout
        scores, components = self.reward(rollout.prompts, rollout.replies)
        scored = time.perf_counter()
        progress.at("forward")
        learned = scale(scores.to(self.distributed.device), self.distributed.sum) if scale else scores
        experience, row = collect(
            rollout,
            learned,
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
        if self.options.normalise_rewards != "none" or self.options.reward_clip is not None:
            row["reward_learned"] = self._mean(learned)
        row |= quantiles(
            "reward", [score for score in self.distributed.gather(scores.tolist()) if not math.isnan(score)]
        )
        row |= quantiles("reply_tokens", self.distributed.gather([len(reply.ids) for reply in rollout.replies]))
        row |= {
            "seconds_publish": published - started,
            "seconds_rollout": sampled - published,
            "seconds_score": scored - sampled,
            "seconds_forward": time.perf_counter() - scored,
        }
        return experience, row

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """Several epochs of clipped updates over shuffled mini-batches. Returns metrics, averaged over the updates.

        In the iterations of `critic_warmup_steps` the critic alone is updated. After an update whose mini-batch had a policy too
        far from the sampling one (`update_kl_limit`), no other follows.

        A mini-batch's loss is the mean over its tokens on all ranks: each micro-batch's sum is divided by the mini-batch's
        token count, of the policy without the tokens of weight 0. The gradient is invariant to micro-batch size and number of
        ranks.
        """
        options, distributed = self.options, self.distributed
        sequences, device = experience.sequences, experience.log_probs.device
        rows = len(experience.log_probs)
        updates = options.rollout_batch_size // options.global_batch_size
        generator = torch.Generator().manual_seed(rollout_seed(options.seed, step, distributed.rank))
        totals = torch.zeros(len(_AVERAGED), dtype=torch.float64, device=device)
        norms: list[float] = []
        warming, made, largest = step <= options.critic_warmup_steps, 0, 0.0
        for mini_batch in _mini_batches(rows, rows // updates, options.epochs, generator):
            mini_batch = mini_batch.to(device)
            tokens = distributed.sum(sequences.reply_mask[mini_batch].sum())
            kept = distributed.sum((experience.weights[mini_batch] > 0).sum().float()).clamp(min=1)
            texts = self._texts(((step - 1) * options.epochs * updates + made) * options.global_batch_size)
            moved = torch.zeros(1, dtype=torch.float64, device=device)
            for index, part in sequences.micro_batches(mini_batch, options.micro_batch_size):
                mask = part.reply_mask
                old = (index, slice(mask.shape[1]))
                loss, clipped, kl, text_loss = torch.zeros(4, device=device)
                if not warming:
                    text = next(texts)
                    loss, clipped, kl, text_loss = self._policy_backward(experience, old, part, text, tokens, kept)
                value_loss, value_clipped = losses.value_loss(
                    reply_values(self.critic, part),
                    experience.values[old], experience.returns[old], mask, options.value_clip_range, tokens,
                )  # fmt: skip
                self.critic.backward(value_loss)
                moved += kl
                totals += torch.stack(
                    [loss, value_loss, clipped / kept, value_clipped / tokens, kl, text_loss]
                ).detach()
            if not warming:
                self.actor.step()
                if (norm := self.actor.gradient_norm()) is not None:
                    norms.append(norm)
            self.critic.step()
            made += 1
            largest = max(largest, distributed.sum(moved).item())
            if options.update_kl_limit is not None and largest > options.update_kl_limit:
                break
        totals = distributed.sum(totals) / made
        row = dict(zip(_AVERAGED, totals.tolist(), strict=True))
        if self.pretraining is None:
            del row["pretraining_loss"]
        row |= {"updates": float(made), "update_kl_max": largest}
        return row | ({"gradient_norm": sum(norms) / len(norms)} if norms else {})

    def _policy_backward(
        self,
        experience: Experience,
        old: tuple[Tensor, slice],
        part: Sequences,
        text: Tensor | None,
        tokens: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A micro-batch's gradient of the policy. Returns clipped loss, clipped tokens, KL so far, loss of the text.

        Args:
            experience: of the iteration.
            old: the micro-batch's rows and columns in it.
            part: the micro-batch.
            text: rows of pretraining text [B, length].
            tokens: of the mini-batch's replies.
            kept: those with a weight above 0.
        """
        options = self.options
        logits = reply_logits(self.actor, part)
        log_probs = losses.token_log_probs(logits, part.reply_ids, options.temperature)
        loss, clipped = losses.policy_loss(
            log_probs,
            experience.log_probs[old],
            experience.advantages[old],
            experience.weights[old],
            options.clip_range,
            kept,
        )
        objective = loss
        if options.entropy_coefficient:
            entropies = losses.token_entropies(logits, options.temperature)
            objective = loss - options.entropy_coefficient * losses.entropy_bonus(entropies, part.reply_mask, tokens)
        text_loss = torch.zeros_like(loss)
        if text is not None:
            predicted = options.global_batch_size * (text.shape[1] - 1)
            text_loss = -text_log_probs(self.actor, text).sum() / predicted
            coefficient = 1.0 if options.pretraining_coefficient is None else options.pretraining_coefficient
            objective = objective + coefficient * text_loss
        self.actor.backward(objective)
        kl = losses.update_kl(log_probs, experience.log_probs[old], part.reply_mask, tokens)
        return loss.detach(), clipped, kl, text_loss.detach()

    def _texts(self, begin: int) -> Iterator[Tensor | None]:
        """This rank's rows of pretraining text for each micro-batch of an update; None without such text.

        `begin`: rows that earlier updates have used; they are shuffled for each pass.
        """
        if self.pretraining is None:
            return itertools.repeat(None)
        options, world = self.options, self.distributed
        order = _order(len(self.pretraining), options.seed, begin, begin + options.global_batch_size)
        own = [row for place, row in enumerate(order) if place % world.world_size == world.rank]
        parts = [
            own[first : first + options.micro_batch_size] for first in range(0, len(own), options.micro_batch_size)
        ]
        return iter([self.pretraining.rows(part).to(world.device) for part in parts])

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

    def _save(self, step: int, kl_coefficient: float, scale: RewardScale) -> None:
        place = self.state.begin(step)
        self.actor.save(place / "actor")
        self.critic.save(place / "critic")
        self.distributed.barrier()
        if self.distributed.rank == 0:
            self.state.commit(step, {"kl_coefficient": kl_coefficient, "rewards": scale.facts()})
            if self.held_out:
                self.held_out.saved(step)
        self.distributed.barrier()

    def _resume(self) -> tuple[int, float, RewardScale]:
        """The next iteration, its KL coefficient, and the scale of rewards."""
        step = on_rank_0(self.state.create)
        if step is None:
            return 1, self.options.kl_coefficient, self._scale({})
        place = self.state.step_path(step)
        self.actor.load(place / "actor")
        self.critic.load(place / "critic")
        log(f"resuming after iteration {step}")
        facts = self.state.facts(step)
        return step + 1, facts["kl_coefficient"], self._scale(facts.get("rewards", {}))

    def _scale(self, moments: Mapping[str, float]) -> RewardScale:
        return RewardScale(self.options.normalise_rewards, self.options.reward_clip, moments)


def _mini_batches(rows: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each update, shuffled in each epoch."""
    for _ in range(epochs):
        yield from torch.randperm(rows, generator=generator).split(size)


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
