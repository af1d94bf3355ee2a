"""Trainable and frozen weights, set after the model is built and before it is wrapped for data parallelism.

A frozen weight has no gradient, no gradient buffer and no optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from shared.errors import UserError
from shared.mapping.adapters import LoraSettings
from shared.model import lora
from shared.model.gpt import LanguageModel


@dataclass(frozen=True)
class Full:
    """Every weight is trained."""

    def apply(self, chunks: list[LanguageModel]) -> None:
        """Parameters are built trainable: nothing to do."""


@dataclass(frozen=True)
class Frozen:
    """Weights whose names match a pattern are frozen, all others are trained.

    Patterns are those of `fnmatch`. Names are global: `embedding.*`, `decoder.layers.0.*`, layers counted over all pipeline
    stages. All experts of a layer share one name: `decoder.layers.0.mlp.experts.*`. A tied output layer has the name
    `embedding.word_embeddings.weight`. A frozen router keeps its correction bias.
    """

    patterns: tuple[str, ...]
    # By a person, who may misspell one: matches on all ranks are counted. A rehearsal, whose ranks are alone, cannot.
    given: bool = field(default=True, compare=False)

    def apply(self, chunks: list[LanguageModel]) -> None:
        """Freeze parameters of this rank's model chunks. Every rank calls this.

        Raises:
            UserError: a pattern matches no parameter of any rank, or no parameter is left to train.
        """
        matched: set[str] = set()
        trained = 0
        for chunk in chunks:
            for name, parameter in _parameters(chunk):
                if matching := {pattern for pattern in self.patterns if fnmatchcase(name, pattern)}:
                    parameter.requires_grad_(False)
                matched |= matching
                trained += parameter.requires_grad
            _complete(chunk)
        if not self.given:
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (matched, trained))
        if unknown := sorted(set(self.patterns).difference(*(names for names, _ in gathered))):
            raise UserError(
                f"no parameter of the model matches {', '.join(unknown)}; "
                "names look like decoder.layers.0.mlp.linear_fc1.weight"
            )
        if not any(count for _, count in gathered):
            raise UserError(f"{', '.join(self.patterns)}: no parameter is left to train; freeze less")


@dataclass(frozen=True)
class Lora:
    """LoRA adapters are added and trained, every weight of the model is frozen.

    Adapters have their own weight decay, 0 by default. It draws A and B, not `W + scale * B @ A`, towards zero; PEFT's
    trainings have none.
    """

    settings: LoraSettings
    seed: int  # of the adapters' first values

    def apply(self, chunks: list[LanguageModel]) -> None:
        """Freeze the weights of this rank's model chunks and add adapters. Every rank calls this.

        Raises:
            UserError: of `lora.attach`.
        """
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.requires_grad_(False)
        lora.attach(chunks, self.settings, self.seed)
        for chunk in chunks:
            _complete(chunk)


type Trainable = Full | Frozen | Lora

FULL = Full()


def partly_frozen(chunks: list[LanguageModel]) -> bool:
    """Whether a weight is frozen in some layers and trained in others. Every rank calls this."""
    own = {(re.sub(r"\.\d+\.", ".", name), each.requires_grad) for chunk in chunks for name, each in _parameters(chunk)}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    weights = set().union(*gathered)
    return len(weights) > len({name for name, _ in weights})


def _parameters(chunk: LanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with their global names."""

    def decoder_layer(found: re.Match[str]) -> str:
        return f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}."

    for name, parameter in chunk.named_parameters():
        if chunk.share_embeddings_and_output_weights and name == "output_layer.weight":
            yield "embedding.word_embeddings.weight", parameter
        else:
            name = re.sub(r"^decoder\.layers\.(\d+)\.", decoder_layer, name)
            name = re.sub(r"\.local_experts\.\d+\.", ".", name)
            # One module of TransformerEngine has the weights of all experts, numbered.
            yield re.sub(r"(\.experts\.linear_fc[12]\.(?:weight|bias))\d+$", r"\1", name), parameter


def _complete(chunk: LanguageModel) -> None:
    """What frozen weights ask for beside `requires_grad`."""
    for module in chunk.modules():
        if getattr(module, "expert_bias", None) is not None and not module.weight.requires_grad:
            # Megatron-Core updates the correction bias, without a gradient, after each update unless this is set.
            module.frozen_expert_bias = True
    if chunk.config.recompute_granularity and chunk.pre_process:
        _require_gradient(chunk)


def _require_gradient(chunk: LanguageModel) -> None:
    """Make the output of a frozen embedding require a gradient.

    A recomputed layer computes no weight gradients if its input requires none.
    """
    if not any(parameter.requires_grad for parameter in chunk.embedding.parameters()):
        chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
