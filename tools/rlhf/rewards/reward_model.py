"""Rewards from a reward model: a sequence-classification model with one label, scored at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import StageError, UserError
from tools.rlhf.data import Prompt
from tools.rlhf.rollout.rollout import Reply
from tools.rlhf.transformers_model import load_transformers_model


def load_reward_model(path: Path, dtype: torch.dtype) -> Any:
    """A sequence-classification model with one label, in evaluation mode. UserError for any other model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names) or config.num_labels != 1:
        raise UserError(f"--reward model:{path} is no reward model ({', '.join(names)}); make one with `rlhf reward`")
    if config.pad_token_id is None:
        raise UserError(f"--reward model:{path}: config.json has no pad_token_id to find the last token by; add it")
    return load_transformers_model(
        AutoModelForSequenceClassification, path, place=f"--reward model:{path}", dtype=dtype
    )


class ModelReward:
    """The `Scorer` of a reward model; its input is prompt + reply."""

    def __init__(self, path: Path, model: Any, tokenizer: Any | None, *, device: torch.device, batch_size: int) -> None:
        """`tokenizer` re-tokenises the text; None if policy and reward model share a vocabulary."""
        self._path, self._model, self._tokenizer = path, model, tokenizer
        self._device, self._batch_size = device, batch_size
        config = getattr(model, "module", model).config
        self._pad, self._context = config.pad_token_id, config.max_position_embeddings

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        sequences = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        longest = max(map(len, sequences))
        if longest > self._context:
            raise StageError(
                f"--reward model:{self._path} has a context of {self._context} tokens and a prompt with its reply has "
                f"{longest}; lower --max-new-tokens or train a reward model with a longer context"
            )
        scores = torch.zeros(len(sequences))
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # reduces padding
        for start in range(0, len(sequences), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            scores[batch] = score(self._model, [sequences[i] for i in batch], self._pad, self._device)
        return scores.tolist()

    def _ids(self, prompt: Prompt, reply: Reply) -> Sequence[int]:
        if self._tokenizer is None:
            return (*prompt.ids, *reply.ids)
        ids = self._tokenizer(prompt.text + reply.text)["input_ids"]
        return [*ids, self._tokenizer.eos_token_id] if reply.ended else ids


@torch.no_grad()
def score(model: Any, sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Scores [sequences], float32 on the CPU, of right-padded token sequences."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad_id] * (longest - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().cpu()
