"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.families.common.fields import Fields
from shared.mapping.rule import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its configuration both ways and its tensors."""

    name: str
    title: str  # what people call it, and which members are meant
    hf_class: str  # the class whose weights these are
    other_classes: tuple[str, ...] = ()  # further names of it in published configurations
    remote: bool = False  # the class is not transformers': models are published with code of their own
    placed: bool = False  # the class is handed positions and mask, which others find in the tokens
    model_types: tuple[str, ...] = ()  # as configurations say it, what is written first; empty: the name
    # Where several families share a model_type: whether a configuration is this one's.
    claims: Callable[[Mapping[str, Any]], bool] = lambda config: True
    # The first uploads' spelling of a configuration in today's, where they differ.
    today: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    # What other small files in its folder say, as further fields of a config.json that lacks them.
    beside: Callable[[Path], Mapping[str, Any]] = lambda directory: {}
    # The part of a configuration that describes the language model, where there is more.
    language: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    read: Callable[[Fields], Architecture]
    table: Callable[[Architecture], Table]
    write: Callable[[Architecture], dict[str, Any]]  # the family's own fields of a new config.json
    sizes: Mapping[str, Architecture] = field(default_factory=dict)  # named sizes for `convert init`

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_types", self.model_types or (self.name,))

    @property
    def classes(self) -> tuple[str, ...]:
        """Every name of its class."""
        return (self.hf_class, *self.other_classes)


def tiny(base: Architecture, **changes: Any) -> Architecture:
    """A size of the same family for tests and first steps: two layers, 512 tokens."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    return replace(base, **(sizes | changes))
