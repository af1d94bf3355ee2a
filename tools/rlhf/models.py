"""Loads policy, tokenizer and critic from Hugging Face directories; writes the published directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.checkpoint.directory.auxiliary_files import finish_hf_directory
from shared.checkpoint.directory.open import open_checkpoint
from shared.data.tokenizer import open_tokenizer
from shared.errors import StageError, UserError
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.options import PolicyOptions
from tools.rlhf.transformers_model import load_transformers_model


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
    """Dtype of the weights, in this and in the published directory."""

    @property
    def context_length(self) -> int:
        """Context length in tokens."""
        return self.config.max_position_embeddings


def open_source(path: Path, *, flag: str = "--source") -> Source:
    """Open a Hugging Face directory of a causal language model and check that it is complete."""
    from transformers import AutoConfig

    open_checkpoint(path, kinds=("hf",), flag=flag)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if not any(name.endswith("ForCausalLM") for name in config.architectures or []):
        raise UserError(f"{flag} {path} is no causal language model: its architectures are {config.architectures}")
    tokenizer = open_tokenizer(path, flag=flag)
    generation = path / "generation_config.json"
    listed = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [] if listed is None else [listed])}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for token in (*eos_ids, pad_id):
        if not 0 <= token < config.vocab_size:
            raise UserError(f"{flag} {path}: special token {token} is outside the vocabulary of {config.vocab_size}")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Source(
        path=path, config=config, tokenizer=tokenizer, eos_ids=tuple(sorted(eos_ids)), pad_id=pad_id, dtype=dtype
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
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_transformers_model(AutoModelForCausalLM, source.path, place=f"--source {source.path}", dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=list(source.eos_ids), pad_token_id=source.pad_id)
    return model


def keep_in_evaluation_mode(model: nn.Module) -> None:
    """Keep the layers in evaluation mode under `model.train()`; only the model's own flag follows it.

    With dropout, the noise of a router or dropped layers, trainer and sampler would be different distributions.
    """

    def train(mode: bool = True) -> nn.Module:
        nn.Module.train(model, False)
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
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return self.head(hidden).squeeze(-1)


def load_critic(path: Path, dtype: torch.dtype, *, vocab_size: int) -> Critic:
    """A critic from a reward model (body and head, as in InstructGPT) or a language model (body, zero-initialised head)."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.vocab_size != vocab_size:
        raise UserError(
            f"--critic {path} has a vocabulary of {config.vocab_size} and the policy one of {vocab_size}; "
            "give a critic of the policy's tokenizer"
        )
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        model = load_transformers_model(AutoModelForSequenceClassification, path, place=f"--critic {path}", dtype=dtype)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise UserError(f"--critic {path}: {type(model).__name__} has no one-label head to start a critic from")
        return Critic(model.base_model, head).eval()
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or [])
    auto_class = AutoModelForCausalLM if causal else AutoModel
    body = load_transformers_model(auto_class, path, place=f"--critic {path}", dtype=dtype).base_model
    width = body.get_input_embeddings().embedding_dim  # width of the output; OPT 350M's layers are wider
    head = nn.Linear(width, 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return Critic(body, head).eval()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def save_hf(
    model: Any, directory: Path, source: Source, *, weights: dict[str, Tensor] | None = None, new_config: bool = False
) -> dict[str, Any]:
    """Write a Hugging Face directory with the source's auxiliary files.

    Args:
        model: a transformers model; its weights are written unless `weights` is given.
        directory: the output directory.
        source: the initial model's directory.
        weights: unsharded tensors by name; by default the model's state dict.
        new_config: write the model's config.json; by default the source's is copied.

    Returns:
        manifest entries.
    """
    weights = model.state_dict() if weights is None else weights
    weights = {name: t.to(source.dtype) if t.is_floating_point() else t for name, t in weights.items()}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise StageError(f"{name} is not finite after training; nothing is published. Lower --learning-rate")
    model.config.dtype = source.dtype
    model.save_pretrained(directory, state_dict=weights)
    # It has training's sampling settings; the source's file is copied instead.
    (directory / "generation_config.json").unlink(missing_ok=True)
    if not new_config:
        (directory / "config.json").unlink()
    finish_hf_directory(directory, source.path)
    return {
        "family": model.config.model_type,
        "architecture": type(model).__name__,
        "dtype": str(source.dtype).removeprefix("torch."),
        "tensors": len(weights),
        "parameters": parameter_count_of(weights),
    }


def parameter_count_of(weights: dict[str, Tensor]) -> int:
    """Number of parameters in a state dict; tied tensors count once."""
    return sum({t.data_ptr(): t.numel() for t in weights.values()}.values())
