"""TRL's GRPOTrainer and RLOOTrainer, with a check that they train the distribution they sample from."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer, RLOOTrainer

from shared.runtime import progress
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import agreement, weight_fractions
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.trl import TrainedPolicy
from tools.rlhf.rollout.in_process import generate_in_parts
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap
from tools.rlhf.rollout.on_servers import ServerSampler
from tools.rlhf.rollout.sampler import rollout_seed
from tools.rlhf.transformers_model import base_of


@dataclass(frozen=True, kw_only=True)
class Importance:
    """An importance correction, see `losses.importance_weights`."""

    correction: losses.Correction
    cap: float


class Checked:
    """Compares the log-probabilities of every roll-out's tokens: the sampler's and those that the loss takes.

    A mixin, in front of one of TRL's trainers. Replies come from `generate`, or from servers.
    """

    accelerator: Any
    args: Any
    model: Any
    processing_class: Any
    ref_model: Any
    state: Any
    temperature: float
    _get_per_token_logps_and_entropies: Any
    _metrics: Any

    def __init__(
        self,
        *,
        distributed: DistributedContext,
        log_prob_gap_limit: float,
        servers: ServerSampler | None = None,
        rollout_micro_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            distributed: the ranks.
            log_prob_gap_limit: largest mean gap of a roll-out in nats, see `check_log_prob_gap`.
            servers: sample the replies; by default the trained model does.
            rollout_micro_batch_size: replies that the trained model samples at once; by default all.
            arguments: the trainer's.
        """
        self._rollout_size = rollout_micro_batch_size
        self._distributed, self._limit, self._servers = distributed, log_prob_gap_limit, servers
        self._sampled: Tensor | None = None  # log-probabilities of the sampler, [B, T]
        self._checked = False
        super().__init__(**arguments)
        for model in (self.model, self.ref_model):
            if model is not None:
                pass_position_ids(self.accelerator.unwrap_model(model))

    def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
        progress.at("roll-out", limit=None if self._servers is None else math.inf)  # servers have --rollout-timeout
        if self._servers is not None:
            return self._from_servers(self._servers, prompt_ids)
        policy = self.accelerator.unwrap_model(self.model)
        whole = policy.generate

        def generate(**inputs: Any) -> Tensor:
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            settings = {name: value for name, value in inputs.items() if name not in tensors}
            ids, self._sampled = generate_in_parts(
                partial(whole, **settings),
                tensors,
                temperature=self.temperature,
                pad_id=self.processing_class.pad_token_id,
                size=self._rollout_size,
                seed=rollout_seed(self.args.seed, self.state.global_step, self._distributed.rank),
            )
            return ids

        policy.generate = generate
        try:
            return super()._generate_single_turn(prompt_ids, *arguments, **named)  # type: ignore[misc]
        finally:
            del policy.generate

    def _from_servers(self, servers: ServerSampler, prompts: list[list[int]]) -> Any:
        """Publish the policy, and sample a reply to each prompt."""
        step = self.state.global_step
        servers.publisher.publish(TrainedPolicy(self), step)
        replies = servers.replies(prompts, seed=rollout_seed(self.args.seed, step, self._distributed.rank))
        self._sampled = servers.log_probs(replies)
        return self._single_turn([list(reply.ids) for reply in replies])

    def _single_turn(self, replies: list[list[int]]) -> Any:
        """What `_generate_single_turn` of the trainer returns."""
        return replies

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self._sampled is None:
            return output
        mask = output["completion_mask"]
        trained = output.get("old_per_token_logps")
        if trained is None:
            trained, *_ = self._get_per_token_logps_and_entropies(
                self.accelerator.unwrap_model(self.model),
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], mask], dim=1),
                mask.shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
        sampled = self._sampled[:, : mask.shape[1]]
        row = agreement(sampled, trained.float(), mask.float(), self._distributed)
        check_log_prob_gap(row["log_prob_gap"], self._limit, first=not self._checked)
        self._checked, self._sampled = True, None
        row |= self._correct(output, sampled, trained, mask)
        for name, value in row.items():
            self._metrics["train"][name].append(value)
        return output

    def _correct(self, output: dict[str, Any], sampled: Tensor, trained: Tensor, mask: Tensor) -> dict[str, float]:
        """Weigh the tokens of a roll-out; returns metrics."""
        return {}


class CheckedGRPOTrainer(Checked, GRPOTrainer):
    """TRL's GRPO."""

    def __init__(self, *, importance: Importance | None = None, **arguments: Any) -> None:
        """`importance`: the correction; the rest is `Checked`'s."""
        self._importance = importance
        super().__init__(**arguments)

    def _single_turn(self, replies: list[list[int]]) -> Any:
        return replies, None

    def _correct(self, output: dict[str, Any], sampled: Tensor, trained: Tensor, mask: Tensor) -> dict[str, float]:
        """Weights go into the advantages: a token's loss is linear in its advantage, whichever side of the clip it is on.

        The mask of tools' tokens takes those of weight 0 out of the loss and its denominator; the attention keeps them.
        """
        if self._importance is None:
            return {}
        weights = losses.importance_weights(trained, sampled, mask, self._importance.correction, self._importance.cap)
        kept = (weights > 0).to(mask.dtype)
        output["advantages"] = output["advantages"].unsqueeze(1) * weights
        output["tool_mask"] = kept
        output["num_items_in_batch"] = self._distributed.sum(kept.sum())
        return weight_fractions(weights.float(), mask.float(), self._importance.cap, self._distributed)


class CheckedRLOOTrainer(Checked, RLOOTrainer):
    """TRL's RLOO."""


def pass_position_ids(model: nn.Module) -> None:
    """Number a left-padded row's positions from its first token, where TRL leaves that to the model.

    Rotary positions are relative: padding does not matter to them. Learned ones (GPT-2) would be shifted by it.
    """
    own = base_of(model)
    rotary = any("rotary" in name for name, _ in own.named_modules())
    if rotary or "position_ids" not in inspect.signature(type(own).forward).parameters:
        return

    def add(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = named.get("attention_mask")
        if named.get("position_ids") is None and named.get("past_key_values") is None and mask is not None:
            named["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return arguments, named

    model.register_forward_pre_hook(add, with_kwargs=True)
