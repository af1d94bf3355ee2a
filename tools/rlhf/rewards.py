"""Rewards of replies: reward models and Python functions, weighted and added up."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.checkpoint.directory.open import open_checkpoint
from shared.data.tokenizer import open_tokenizer
from shared.errors import StageError, UserError
from shared.families.common.transformers_workarounds import completed
from tools.rlhf.data import Prompt
from tools.rlhf.reward_spec import RewardSpec


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a policy wrote after a prompt."""

    ids: tuple[int, ...]
    """Its tokens, through the end-of-sequence token if there is one."""
    text: str
    """The same without special tokens."""
    ended: bool
    """Whether it ends with an end-of-sequence token."""


class Scorer(Protocol):
    """Gives every reply a score."""

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]: ...


class Reward:
    """The weighted sum of its components."""

    def __init__(self, components: Sequence[tuple[RewardSpec, Scorer]]) -> None:
        self.components = tuple(components)

    @property
    def names(self) -> tuple[str, ...]:
        """The components' names, in the order of `--reward`."""
        return tuple(spec.name for spec, _ in self.components)

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sums [replies] and each component's unweighted scores [replies], float32 on the CPU."""
        scores = {spec.name: torch.tensor(scorer(prompts, replies)) for spec, scorer in self.components}
        total = torch.stack([spec.weight * scores[spec.name] for spec, _ in self.components]).sum(0)
        return total, scores


def load(
    specs: Sequence[RewardSpec],
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
) -> Reward:
    """The rewards of `--reward`.

    Args:
        specs: what `reward_spec.parse` read.
        tokenizer: the policy's, whose ids a reward model of the same vocabulary reads as they are.
        device: where reward models run.
        dtype: of reward models' weights.
        batch_size: replies a forward pass.
        wrap: puts a reward model into an engine.
    """
    components: list[tuple[RewardSpec, Scorer]] = []
    for spec in specs:
        if spec.function is not None:
            components.append((spec, FunctionReward(spec.path, spec.function)))
            continue
        open_checkpoint(spec.path, kinds=("hf",), flag="--reward")
        model = wrap(load_reward_model(spec.path, dtype).to(device))
        own = open_tokenizer(spec.path, flag="--reward")
        same = own.get_vocab() == tokenizer.get_vocab()
        components.append(
            (spec, ModelReward(spec.path, model, None if same else own, device=device, batch_size=batch_size))
        )
    return Reward(components)


def load_reward_model(path: Path, dtype: torch.dtype) -> Any:
    """A sequence-classification model with one label, in evaluation mode; UserError for any other directory."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names) or config.num_labels != 1:
        raise UserError(f"--reward model:{path} is no reward model ({', '.join(names)}); make one with `rlhf reward`")
    if config.pad_token_id is None:
        raise UserError(f"--reward model:{path}: config.json has no pad_token_id, so the last token cannot be found")
    return completed(
        AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, local_files_only=True)
    ).eval()


class ModelReward:
    """A reward model's score of prompt and reply, read at the last token."""

    def __init__(self, path: Path, model: Any, tokenizer: Any | None, *, device: torch.device, batch_size: int) -> None:
        """`tokenizer` is None when the policy's ids are the model's own; else texts are tokenized with it."""
        self._path, self._model, self._tokenizer = path, model, tokenizer
        self._device, self._batch_size = device, batch_size
        config = getattr(model, "module", model).config
        self._pad, self._context = config.pad_token_id, config.max_position_embeddings

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        sequences = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        longest = max(map(len, sequences))
        if longest > self._context:
            raise StageError(
                f"--reward model:{self._path} reads at most {self._context} tokens and a prompt with its reply has "
                f"{longest}; lower --max-new-tokens or train a reward model of a longer context"
            )
        scores = torch.zeros(len(sequences))
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # a batch then holds little padding
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
    """Scores [sequences] (float32, CPU) of token sequences, padded on the right as the model expects."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad_id] * (longest - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().cpu()


class FunctionReward:
    """`def f(prompts: list[str], completions: list[str], **columns) -> list[float]` of a Python file."""

    def __init__(self, path: Path, function: str) -> None:
        self._where = f"--reward py:{path}:{function}"
        spec = importlib.util.spec_from_file_location(f"baton_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{self._where}: {path} is not a Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{self._where}: the file does not load: {type(error).__name__}: {error}") from error
        found = getattr(module, function, None)
        if not callable(found):
            others = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UserError(f"{self._where}: no such function; the file has: {', '.join(others) or 'none'}")
        self._function = found

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
        texts = [prompt.text for prompt in prompts]
        try:
            answer = self._function(texts, [reply.text for reply in replies], **columns)
            scores = [float(value) for value in answer]
        except Exception as error:
            raise StageError(f"{self._where} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(replies):
            raise StageError(f"{self._where} gave {len(scores)} rewards for {len(replies)} completions")
        for value in scores:
            if not math.isfinite(value):
                raise StageError(f"{self._where} gave {value}; every reward is a finite number")
        return scores
