"""`rlhf ppo --backend trlx`: our loop with trlx's updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.console import log
from shared.errors import StageError
from shared.precision import DTYPES, TrainingPrecision
from tools.rlhf.algorithms.experience import Experience
from tools.rlhf.algorithms.ppo_loop import PPO
from tools.rlhf.data import Prompt
from tools.rlhf.engines import trlx_package
from tools.rlhf.engines.deepspeed import EngineOptions, frozen_model
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.engines.trlx_settings import TrlxSettings
from tools.rlhf.lora import AdapterOff, Adapters, held_dtype
from tools.rlhf.models import Source, keep_in_evaluation_mode, load_policy
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rewards import weighted_sum
from tools.rlhf.rollout.rollout import Reply
from tools.rlhf.rollout.sampler import rollout_seed

if TYPE_CHECKING:
    from tools.rlhf.engines.trlx_trainer import TrlxActor, TrlxValues


@dataclass(frozen=True, kw_only=True)
class TrlxPPO(PPO):
    """A PPO run whose updates are trlx's."""

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """As in `PPO`; a loss is a mean over the tokens of a micro-batch, and an update's the mean over micro-batches."""
        seed = rollout_seed(self.options.seed, step, self.distributed.rank)
        return self.actor.trainer.train_on(experience, seed=seed)  # type: ignore[attr-defined]


class ScoredReplies(weighted_sum.Reward):
    """A reward that has a number for every reply: trlx learns from each of them."""

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Reward`.

        Raises:
            StageError: no component had an opinion on a reply.
        """
        scores, components = super().__call__(prompts, replies)
        if missing := int(scores.isnan().sum()):
            raise StageError(
                f"--reward: no function had an opinion on {missing} of {len(replies)} replies, and --backend trlx learns from "
                "every reply; return a number for each, or use --backend deepspeed"
            )
        return scores, components


def trained_policy(options: PPOOptions, source: Source, adapters: Adapters | None, precision: TrainingPrecision) -> Any:
    """The model that trlx trains: of transformers, or PEFT's around it; what is trained is float32."""
    policy = load_policy(source, held_dtype(precision, adapters))
    keep_in_evaluation_mode(policy)  # trlx's backward pass is in training mode, and layers may be recomputed in it
    if options.gradient_checkpointing:
        recompute_layers(policy)
    return policy if adapters is None else adapters.attach(policy, options.seed, main_weights=True)


def models(
    options: PPOOptions,
    source: Source,
    distributed: DistributedContext,
    adapters: Adapters | None,
    engine: EngineOptions,
) -> tuple[TrlxActor, TrlxValues, Any]:
    """Policy and critic, which one trainer of trlx trains, and the reference policy.

    Args:
        options: of the command.
        source: of the policy.
        distributed: the ranks.
        adapters: with LoRA; the reference then is the policy with its adapters off.
        engine: of the reference model without LoRA.
    """
    place = trlx_package.locate()
    trlx_package.import_trlx(place)
    from tools.rlhf.engines.trlx_trainer import TrlxActor, TrlxValues, open_trainer

    log(f"trlx      {place}, as it is; written for commit {trlx_package.COMMIT[:7]}")
    precision = options.precision_on(distributed.device.type)
    # Before the trainer: with its ZeRO-3, transformers would shard a model while it is loaded.
    policy = trained_policy(options, source, adapters, precision)
    whole = load_policy(source, getattr(torch, DTYPES[precision])) if adapters is None else None
    settings = TrlxSettings.of(options, precision=precision, world_size=distributed.world_size)
    trainer = open_trainer(policy, settings, distributed)
    actor = TrlxActor(trainer)
    # An actor of its own: the values of its forward pass are not the policy's.
    reference = AdapterOff(TrlxActor(trainer)) if whole is None else frozen_model(whole, engine)
    return actor, TrlxValues(actor), reference
