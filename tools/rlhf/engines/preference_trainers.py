"""TRL's DPOTrainer and KTOTrainer on our token ids, with a check of its log-probabilities.

The reference is the model before training: TRL computes its log-probabilities of every row before the first update and keeps
them beside the rows, so there is no second model. Rows are on disk, in the state: TRL finds its results there after a resume,
by a hash of rows and weights, and ranks share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch import Tensor
from trl import DPOTrainer, KTOTrainer

from shared.checkpoint.files import commit_directory
from shared.errors import StageError
from shared.runtime.agreement import on_rank_0
from tools.rlhf.algorithms.losses import masked_mean, token_log_probs
from tools.rlhf.rollout.log_prob_gap import FLOAT32_LIMIT


class OwnTokens:
    """Makes one of TRL's trainers take rows of token ids as they are; a mixin, in front of the trainer's class."""

    _log_probs_checked = False

    def _prepare_dataset(self, dataset: Dataset, *unused: Any) -> Dataset:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """TRL's; on the first batch, the log-probabilities that it takes are compared with those of the model's logits."""
        if not self._log_probs_checked:
            check_fused_log_probs(model, inputs)
            self._log_probs_checked = True
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]


class OwnTokensDPOTrainer(OwnTokens, DPOTrainer):
    """Rows: `prompt_ids`, `chosen_ids`, `rejected_ids`."""


class OwnTokensKTOTrainer(OwnTokens, KTOTrainer):
    """Rows: `prompt_ids`, `completion_ids`, `label`, and `KL_completion_ids`, a reply to another prompt of the micro-batch."""


@torch.no_grad()
def check_fused_log_probs(model: Any, inputs: Mapping[str, Tensor]) -> None:
    """StageError unless TRL's fused output layer and the model's own logits give the same log-probabilities.

    TRL computes the output layer itself, in blocks. It knows the scales and caps of logits by the names of configuration fields;
    a family that it does not know would be trained on other probabilities than it has.

    Args:
        model: a model, or an engine of one, with TRL's fused output layer.
        inputs: a batch of its collator: ids [B, S], `attention_mask` and `completion_mask` [B, S].
    """
    mask = inputs["completion_mask"]
    ids, sent = inputs["input_ids"], {name: inputs[name] for name in ("input_ids", "attention_mask")}
    fused = model(**sent, labels=ids.masked_fill(mask == 0, -100), fused_lm_head=True, use_cache=False).log_probs
    logits = model(**sent, use_cache=False).logits[:, :-1]
    gaps = (fused - token_log_probs(logits, ids[:, 1:])).abs()
    gap = masked_mean(gaps, mask[:, 1:].to(gaps.dtype)).item()
    if next(model.parameters()).dtype in (torch.float32, torch.float64) and not gap <= FLOAT32_LIMIT:
        raise StageError(
            f"TRL's log-probabilities differ from those of {type(model).__name__} by {gap:.1e} nats a token before the first "
            f"update (limit {FLOAT32_LIMIT:.0e} in fp32): TRL does not know how this family scales its logits. Nothing is "
            "published; train it by `rlhf ppo`"
        )


def rows_on_disk(rows: Sequence[Mapping[str, Any]], directory: Path) -> Dataset:
    """The rows as a data set in a directory that every rank reads; an earlier run's are taken as they are."""

    def write() -> None:
        disable_progress_bars()
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            Dataset.from_list(list(rows)).save_to_disk(str(partial))
            commit_directory(partial, directory)

    on_rank_0(write)
    return load_from_disk(str(directory))
