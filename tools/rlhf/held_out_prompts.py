"""Prompts that are not trained on: their replies and rewards during a run, and the best policy by them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint.files import commit_directory, remove_tree, write_atomically
from shared.console import log
from shared.errors import UserError
from shared.report import page
from shared.runtime import progress
from shared.runtime.agreement import on_rank_0
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.options import PolicyOptions
from tools.rlhf.published_policy import write_policy
from tools.rlhf.quantiles import quantiles
from tools.rlhf.rewards.weighted_sum import Reward
from tools.rlhf.rollout.publisher import Policy, Publisher
from tools.rlhf.rollout.sampler import Sampler, rollout_seed
from tools.rlhf.run_context import RunContext

REPLIES = "replies.jsonl"
BEST = "best"
_FACTS = "best.json"
_SHOWN = 16  # prompts in the report, and replies of each


def read_held_out(options: PolicyOptions, source: Source, trained_on: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of `--validation-prompts`; none without the flag.

    Raises:
        UserError: a row is invalid, or has other columns than the prompts that are trained on.
    """
    if options.validation_prompts is None:
        return []
    flag = f"--validation-prompts {options.validation_prompts}"
    prompts = read_prompts(
        options.validation_prompts,
        source.tokenizer,
        context_length=source.context_length,
        max_new_tokens=options.max_new_tokens,
        flag="--validation-prompts",
    )
    names, given = ({*rows[0].columns} for rows in (trained_on, prompts))
    if names != given:
        raise UserError(
            f"{flag} has the columns {sorted(given)} beside its prompts, and --prompts {sorted(names)}: they are arguments of "
            "reward functions; give both the same"
        )
    return prompts


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A reply to a held-out prompt after an update."""

    step: int
    prompt: int
    """Its row, from 0."""
    text: str
    """Of the prompt."""
    reply: str
    ended: bool
    tokens: int
    reward: float | None
    """None if no reward function had an opinion."""


class HeldOutPrompts:
    """Samples a reply to each prompt before the first update, every so many, and after the last.

    The seeds are the same every time. torch's generators are left as they were: what is trained does not depend on it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: PolicyOptions,
        *,
        policy: Policy,
        publisher: Publisher,
        sampler: Sampler,
        reward: Reward,
        source: Source,
        adapters: Adapters | None,
        directory: Path,
        distributed: DistributedContext,
    ) -> None:
        """
        Args:
            prompts: at least one.
            options: how often, and whether the best policy is kept.
            policy: what is trained.
            publisher: of the sampler.
            sampler: as of the roll-outs.
            reward: as of the roll-outs.
            source: the initial policy's directory.
            adapters: with LoRA; the best policy is published as the last one is, as an adapter or merged.
            directory: the run's state.
            distributed: the ranks.
        """
        self._prompts, self._options, self._policy = prompts, options, policy
        self._publisher, self._sampler, self._reward = publisher, sampler, reward
        self._source, self._adapters, self._directory, self._distributed = source, adapters, directory, distributed
        self._best: tuple[int, float] | None = None

    def begin(self, resumed: int | None) -> None:
        """Open the state: replies and policies that are later than the step to resume from are removed. Every rank calls it.

        A new run's prompts are answered before its first update.
        """
        self._best = on_rank_0(lambda: self._resume(resumed))
        if resumed is None:
            self.evaluate(0)

    def due(self, step: int) -> bool:
        """Whether the prompts are answered after this update."""
        options = self._options
        return step % (options.evaluate_every or options.steps) == 0 or step == options.steps

    def evaluate(self, step: int) -> dict[str, float]:
        """Answer the prompts after update `step`; every rank calls it. Returns metrics."""
        progress.at("held-out prompts", long=True, limit=math.inf)
        self._publisher.publish(self._policy, step)
        device = self._distributed.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            answers = self._answers(step)
        rewards = sorted(answer.reward for answer in answers if answer.reward is not None)
        row = {
            "held_out_tokens": sum(answer.tokens for answer in answers) / len(answers),
            "held_out_ended": sum(answer.ended for answer in answers) / len(answers),
        }
        if rewards:
            row = {"held_out_reward": sum(rewards) / len(rewards)} | quantiles("held_out_reward", rewards) | row
            log(
                f"held out  after update {step}: reward {row['held_out_reward']:.4f}, {row['held_out_tokens']:.1f} tokens"
            )
        on_rank_0(lambda: self._write(answers))
        if self._options.keep_best and rewards:
            self._keep(step, row["held_out_reward"])
        return row

    def saved(self, step: int) -> None:
        """The state of `step` is saved: older best policies are not needed any more. Rank 0 only."""
        kept = sorted(path for path in self._policies() if _step_of(path) <= step)
        for path in kept[:-1]:
            remove_tree(path)

    def publish(self, context: RunContext) -> dict[str, Any]:
        """Put replies, and the best policy as the folder `best`, into the directory to publish; rank 0 only. Returns facts."""
        assert context.out is not None, "rank 0 has the directory in the making"
        shutil.copyfile(self._directory / REPLIES, context.out.path / REPLIES)
        if self._best is None:
            return {}
        (newest,) = sorted(self._policies())[-1:]
        shutil.copytree(newest, context.out.path / BEST, ignore=shutil.ignore_patterns(_FACTS))
        step, reward = self._best
        return {"best_step": step, "best_held_out_reward": reward}

    def figures(self) -> list[str]:
        """The replies of each prompt over time, for the report; rank 0 only."""
        rows = [json.loads(line) for line in (self._directory / REPLIES).read_text(encoding="utf-8").splitlines()]
        return reply_figures(rows)

    def _answers(self, step: int) -> list[Answer]:
        """Of all ranks, in the order of the prompts."""
        world, count = self._distributed, len(self._prompts)
        share = math.ceil(count / world.world_size)  # the same on every rank: with ZeRO-3 they generate in step
        places = [world.rank * share + number for number in range(share)]
        size = self._options.micro_batch_size
        own: list[Answer] = []
        for chunk in range(0, share, size):
            part = places[chunk : chunk + size]
            seed = rollout_seed(self._options.seed, 0, world.rank * share + chunk)
            rollout = self._sampler.sample([self._prompts[place % count] for place in part], seed=seed)
            scores, _ = self._reward(rollout.prompts, rollout.replies)
            for place, reply, score in zip(part, rollout.replies, scores.tolist(), strict=True):
                own.append(
                    Answer(
                        step=step,
                        prompt=place,
                        text=self._prompts[place % count].text,
                        reply=reply.text,
                        ended=reply.ended,
                        tokens=len(reply.ids),
                        reward=None if math.isnan(score) else score,
                    )
                )
        return [answer for answer in world.gather(own) if answer.prompt < count]

    def _write(self, answers: Sequence[Answer]) -> None:
        with (self._directory / REPLIES).open("a", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(vars(answer), ensure_ascii=False) + "\n")

    def _keep(self, step: int, reward: float) -> None:
        """Write the policy if it is the best so far; of equal ones, the first."""
        if self._best is not None and reward <= self._best[1]:
            return
        self._best = (step, reward)
        weights = self._policy.full_weights()

        def write() -> None:
            place = self._directory / f"{BEST}_{step:07d}"
            partial = place.with_suffix(".partial")
            remove_tree(partial)
            partial.mkdir(parents=True)
            write_policy(
                partial,
                self._policy.module,
                self._source,
                weights,
                self._adapters,
                self._options,
                target=self._options.target / BEST,
            )
            (partial / _FACTS).write_text(json.dumps({"step": step, "reward": reward}), encoding="utf-8")
            commit_directory(partial, place)

        on_rank_0(write)
        log(f"best      the policy after update {step}, by its held-out reward {reward:.4f}")

    def _policies(self) -> list[Path]:
        return [path for path in self._directory.glob(f"{BEST}_*") if path.suffix != ".partial"]

    def _resume(self, resumed: int | None) -> tuple[int, float] | None:
        """Remove what is later than the step to resume from; the best policy until then."""
        file = self._directory / REPLIES
        lines = file.read_text(encoding="utf-8").splitlines() if resumed is not None and file.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= (resumed or 0)]
        write_atomically(file, "".join(f"{line}\n" for line in kept).encode())
        for path in self._policies():
            if resumed is None or _step_of(path) > resumed:
                remove_tree(path)
        best = max(self._policies(), default=None)
        if best is None or not self._options.keep_best:
            return None
        facts = json.loads((best / _FACTS).read_text(encoding="utf-8"))
        return facts["step"], facts["reward"]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(f"{BEST}_"))


def reply_figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A figure for each of the first prompts, the newest reply first; of many, the first and the last ones."""
    of_prompts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_prompts.setdefault(row["prompt"], []).append(row)
    figures = []
    for place, replies in sorted(of_prompts.items())[:_SHOWN]:
        shown = replies if len(replies) <= _SHOWN else [replies[0], *replies[1 - _SHOWN :]]
        answers = {_heading(row): row["reply"] + ("" if row["ended"] else " ...") for row in reversed(shown)}
        figures.append(page.quoted(f"Held-out prompt {place + 1}", replies[-1]["text"], answers))
    return figures


def _heading(row: Mapping[str, Any]) -> str:
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.4g}"
    return f"after update {row['step']:,}: {reward}, {row['tokens']} tokens"


CHARTS: dict[str, tuple[str, ...]] = {
    "Reward of held-out prompts": (
        "held_out_reward",
        "held_out_reward_p10",
        "held_out_reward_p50",
        "held_out_reward_p90",
    ),
    "Reply length of held-out prompts, tokens": ("held_out_tokens",),
}
