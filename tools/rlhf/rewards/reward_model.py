"""Rewards from a reward model: a sequence-classification model with one label, scored at the last token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import StageError, UserError
from shared.weight_account import account_for_weights
from tools.rlhf.data import Prompt, encode_prompt, encode_reply, end_token_id
from tools.rlhf.rollout.rollout import Reply
from tools.rlhf.transformers_model import (
    accepted,
    classifier_class,
    load_config,
    load_transformers_model,
)


def load_reward_model(path: Path, dtype: torch.dtype, *, place: str | None = None) -> Any:
    """A sequence-classification model with one label, in evaluation mode. UserError for any other model, with its `place`."""
    place = place or f"--reward model:{path}"
    config = load_config(path, place=place)
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names) or config.num_labels != 1:
        raise UserError(f"{place} is no reward model ({', '.join(names)}); make one with `rlhf reward`")
    if config.get_text_config().pad_token_id is None:
        raise UserError(f"{place}: config.json has no pad_token_id to find the last token by; add it")
    account_for_weights(path, place)
    return load_transformers_model(classifier_class(config, place=place), path, place=place, dtype=dtype)


class ModelReward:
    """The `Scorer` of a reward model.

    Its input is `[prompt, reply, end]` as `rlhf reward` trains on it: by the reward model's own tokenizer and chat template,
    an ended reply with the reward model's end token, whichever token ended it. Token ids of the policy are taken where the
    tokenizers agree.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        tokenizer: Any,
        policy_tokenizer: Any,
        *,
        context: int,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """`context`: tokens."""
        self._path, self._model, self._tokenizer = path, model, tokenizer
        self._end = end_token_id(tokenizer)
        both = (tokenizer, policy_tokenizer)
        split, policy_split = (_parts(each, "normalizer", "pre_tokenizer", "model") for each in both)
        around, policy_around = (_parts(each, "post_processor") for each in both)
        known = policy_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
        self._same_tokens = split == policy_split and known
        self._same_text = self._same_tokens and around == policy_around
        self._same_template = self._same_text and tokenizer.chat_template == policy_tokenizer.chat_template
        self._device, self._batch_size = device, batch_size
        config = getattr(model, "module", model).config.get_text_config()
        self._pad, self._context = config.pad_token_id, context

    @property
    def model(self) -> nn.Module:
        """The sequence classifier."""
        module: nn.Module = getattr(self._model, "module", self._model)
        return module

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError for a prompt that the reward model's chat template does not render."""
        for prompt in prompts:
            if isinstance(prompt.raw, str) or self._same_template:
                continue
            try:
                encode_prompt(self._tokenizer, prompt.raw)
            except Exception as error:  # a template may raise any exception
                raise UserError(
                    f"--reward model:{self._path}: its chat template does not render the messages of --prompts "
                    f"({str(error).splitlines()[0]}); give it the template it was trained with"
                ) from error

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
        text = isinstance(prompt.raw, str)
        if self._same_text if text else self._same_template:
            ids = prompt.ids
        else:
            ids = encode_prompt(self._tokenizer, prompt.text if text else prompt.raw)
        sampled = reply.ids[:-1] if reply.ended else reply.ids
        said = sampled if self._same_tokens else encode_reply(self._tokenizer, reply.text)
        return (*ids, *said, self._end) if reply.ended else (*ids, *said)


def _parts(tokenizer: Any, *names: str) -> list[Any]:
    """Parts of a tokenizer.json: `normalizer`, `pre_tokenizer` and `model` split text, `post_processor` adds special tokens."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    return [core[name] for name in names]


@torch.no_grad()
def score(model: Any, sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tensor:
    """Scores [sequences], float32 on the CPU, of right-padded token sequences."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad_id] * (longest - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    inputs = accepted(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    return model(**inputs).logits[:, 0].float().cpu()
