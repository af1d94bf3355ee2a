"""TRL's GRPOTrainer and RLOOTrainer, with a check that they train the distribution they sample from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from trl import GRPOTrainer, RLOOTrainer

from tools.rlhf.algorithms.losses import masked_mean
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.rollout.in_process import SampledLogProbs
from tools.rlhf.rollout.log_prob_gap import check_log_prob_gap


class Checked:
    """Compares the log-probabilities of the first roll-out's tokens: `generate`'s and those that the loss takes.

    A mixin, in front of one of TRL's trainers.
    """

    accelerator: Any
    args: Any
    model: Any
    ref_model: Any
    temperature: float
    _get_per_token_logps_and_entropies: Any

    def __init__(self, *, distributed: DistributedContext, log_prob_gap_limit: float, **arguments: Any) -> None:
        """`log_prob_gap_limit`: largest mean gap in nats, see `check_log_prob_gap`; the rest is the trainer's."""
        self._distributed, self._limit = distributed, log_prob_gap_limit
        self._sampled: SampledLogProbs | None = None
        self._checked = False
        super().__init__(**arguments)
        for model in (self.model, self.ref_model):
            if model is not None:
                pass_position_ids(self.accelerator.unwrap_model(model))

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        if self._checked:
            return super()._generate_single_turn(*arguments, **named)  # type: ignore[misc]
        policy, record = self.accelerator.unwrap_model(self.model), SampledLogProbs(self.temperature)
        whole = policy.generate

        def generate(**inputs: Any) -> Tensor:
            ids = whole(**inputs, logits_processor=LogitsProcessorList([record]))
            record.note(ids)
            return ids

        policy.generate = generate
        try:
            return super()._generate_single_turn(*arguments, **named)  # type: ignore[misc]
        finally:
            del policy.generate
            self._sampled = record

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if not self._checked and self._sampled is not None:
            mask = output["completion_mask"]
            trained, *_ = self._get_per_token_logps_and_entropies(
                self.accelerator.unwrap_model(self.model),
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], mask], dim=1),
                mask.shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
            sampled = torch.cat(self._sampled.columns, dim=1)[:, : mask.shape[1]]
            gaps = torch.where(mask.bool(), (sampled - trained).abs(), 0.0)
            gap = masked_mean(gaps, mask.float(), self._distributed.sum)
            check_log_prob_gap(gap.item(), self._limit)
            self._checked, self._sampled = True, None
        return output


class CheckedGRPOTrainer(Checked, GRPOTrainer):
    """TRL's GRPO."""


class CheckedRLOOTrainer(Checked, RLOOTrainer):
    """TRL's RLOO."""


def pass_position_ids(model: nn.Module) -> None:
    """Number a left-padded row's positions from its first token, where TRL leaves that to the model.

    Rotary positions are relative: padding does not matter to them. Learned ones (GPT-2) would be shifted by it.
    """
    rotary = any("rotary" in name for name, _ in model.named_modules())
    if rotary or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return

    def add(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = named.get("attention_mask")
        if named.get("position_ids") is None and named.get("past_key_values") is None and mask is not None:
            named["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return arguments, named

    model.register_forward_pre_hook(add, with_kwargs=True)
