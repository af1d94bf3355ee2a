"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shared.families.fields import Fields
from shared.mapping.rule import Table
from shared.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its configuration both ways and its tensors."""

    name: str  # Hugging Face's model_type
    title: str  # what people call it, and which members are meant
    hf_class: str  # the transformers class whose weights these are
    other_classes: tuple[str, ...] = ()  # further names of it in published configurations
    read: Callable[[Fields], Architecture]
    table: Callable[[Architecture], Table]
    write: Callable[[Architecture], dict[str, Any]]  # the family's own fields of a new config.json
    sizes: Mapping[str, Architecture] = field(default_factory=dict)  # named sizes for `convert init`


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
