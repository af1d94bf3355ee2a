"""Loads policy, tokenizer and critic from Hugging Face directories; writes the published directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint.directory.open import open_checkpoint
from shared.data.tokenizer import open_tokenizer
from shared.errors import UserError
from shared.weight_account import account_for_weights, tensors_aside
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.options import PolicyOptions
from tools.rlhf.transformers_model import (
    accepted,
    causal_class,
    classifier_class,
    context_length,
    load_config,
    load_transformers_model,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A policy's directory, without its weights."""

    path: Path
    config: Any
    """The transformers configuration."""
    tokenizer: Any
    eos_ids: tuple[int, ...]
    """End-of-sequence tokens of the tokenizer and of generation_config.json."""
    pad_id: int
    dtype: torch.dtype
    """Dtype of the weights."""
    kind: Any
    """The class of transformers that is trained."""
    aside: tuple[str, ...]
    """Tensors that the trained class does not hold (MTP layers); they are published unchanged."""

    @property
    def context_length(self) -> int:
        """Context length in tokens."""
        return context_length(self.config, self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size


def open_source(path: Path, *, flag: str = "--source", classifier: bool = False) -> Source:
    """Open a Hugging Face directory of a causal language model and account for its tensors.

    Args:
        path: the directory.
        flag: for errors.
        classifier: a sequence classifier is trained, from the language model's body.
    """
    place = f"{flag} {path}"
    open_checkpoint(path, kinds=("hf",), flag=flag)
    config = load_config(path, place=place)
    causal = causal_class(config, place=place)
    kind = classifier_class(config, place=place) if classifier else causal
    tokenizer = open_tokenizer(path, flag=flag)
    generation = path / "generation_config.json"
    listed = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [] if listed is None else [listed])}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for token in (*eos_ids, pad_id):
        if not 0 <= token < (rows := config.get_text_config().vocab_size):
            raise UserError(f"{place}: special token {token} is outside the vocabulary of {rows}")
    account_for_weights(path, place)
    return Source(
        path=path,
        config=config,
        tokenizer=tokenizer,
        eos_ids=tuple(sorted(eos_ids)),
        pad_id=pad_id,
        dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32,
        kind=kind,
        aside=tensors_aside(path, place, causal, kind),
    )


def open_policy(options: PolicyOptions) -> tuple[Source, list[Prompt]]:
    """Open and check the initial policy's directory and the prompts."""
    source = open_source(options.source)
    prompts = read_prompts(
        options.prompts,
        source.tokenizer,
        context_length=source.context_length,
        max_new_tokens=options.max_new_tokens,
    )
    return source, prompts


def load_policy(source: Source, dtype: torch.dtype) -> Any:
    """The causal language model, in evaluation mode, for sampling from softmax(logits / temperature).

    `generate` takes what a caller leaves open from the model's generation config: penalties, bans and cut-offs of the source's
    generation_config.json would shape the roll-outs and be unknown to the trainer. Here that config is neutral.
    """
    from transformers import GenerationConfig

    model = load_transformers_model(source.kind, source.path, place=f"--source {source.path}", dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=list(source.eos_ids), pad_token_id=source.pad_id)
    return model


def keep_in_evaluation_mode(model: nn.Module) -> None:
    """Keep the layers in evaluation mode under `model.train()`; only the model's own flag and adapters' dropout follow it.

    With dropout, the noise of a router or dropped layers, trainer and sampler would be different distributions.
    """

    def train(mode: bool = True) -> nn.Module:
        nn.Module.train(model, False)
        for layer in model.modules():
            if isinstance(dropouts := getattr(layer, "lora_dropout", None), nn.ModuleDict):
                dropouts.train(mode)
        model.training = mode  # TRL reads the phase from it
        return model

    model.train = train


class Critic(nn.Module):
    """A language model's body with a linear value head."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Values [B, S]. Inputs are [B, S] each."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        hidden = self.body(input_ids=input_ids, **accepted(self.body, inputs)).last_hidden_state
        return self.head(hidden).squeeze(-1)


def load_critic(path: Path, dtype: torch.dtype, *, vocab_size: int) -> Critic:
    """A critic from a reward model (body and head, as in InstructGPT) or a language model (body, zero-initialised head)."""
    from transformers import AutoModel

    place = f"--critic {path}"
    config = load_config(path, place=place)
    rows = config.get_text_config().vocab_size
    if rows != vocab_size:
        raise UserError(
            f"{place} has a vocabulary of {rows} and the policy one of {vocab_size}; "
            "give a critic of the policy's tokenizer"
        )
    account_for_weights(path, place)
    names = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        model = load_transformers_model(classifier_class(config, place=place), path, place=place, dtype=dtype)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError(f"{place}: {type(model).__name__} has no one-label head to start a critic from")
        return Critic(model.base_model, head).eval()
    only_a_body = any(name.endswith("Model") and not name.endswith("HeadModel") for name in names)
    kind = AutoModel if only_a_body else causal_class(config, place=place)
    body = load_transformers_model(kind, path, place=place, dtype=dtype).base_model
    width = body.get_input_embeddings().embedding_dim  # width of the output; OPT 350M's layers are wider
    head = nn.Linear(width, 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return Critic(body, head).eval()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
