"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.mapping.rule import Table

# Of a size for tests and first steps, in LLaMA's spelling: two layers, 512 tokens.
TINY: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its configuration both ways and its tensors."""

    name: str
    title: str  # what people call it, and which members are meant
    hf_class: str  # the class whose weights these are
    other_classes: tuple[str, ...] = ()  # further names of it in published configurations
    remote: bool = False  # the class is not transformers': models are published with code of their own
    explicit_positions: bool = False  # the class is handed positions and mask, which others find in the tokens
    model_types: tuple[str, ...] = ()  # as configurations say it, what is written first; empty: the name
    # Where several families share a model_type: whether a configuration is this one's.
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    # A configuration with the current names of fields in place of the first uploads'.
    without_legacy_names: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    # Fields of a config.json that auxiliary files in its folder say, for one that lacks them.
    auxiliary_fields: Callable[[Path], Mapping[str, Any]] = lambda directory: {}
    # The part of a configuration that describes the language model, where there is more.
    language: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    read: Callable[[Fields], Architecture]
    names: Names = field(default_factory=Names)  # of its tensors
    # Its tensors in both forms; None: a decoder's, under these names.
    own_table: Callable[[Architecture], Table] | None = None
    write: Callable[[Architecture], dict[str, Any]]  # the family's own fields of a new config.json
    # Named sizes for `convert init`, each as the fields of its config.json that differ from the class's defaults.
    size_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_types", self.model_types or (self.name,))

    @property
    def classes(self) -> tuple[str, ...]:
        """Every name of its class."""
        return (self.hf_class, *self.other_classes)

    def table(self, a: Architecture) -> Table:
        """Its tensors in both forms."""
        return self.own_table(a) if self.own_table else decoder_table(a, self.names)

    @cached_property
    def sizes(self) -> Mapping[str, Architecture]:
        """The named sizes."""
        return {name: self.architecture(config) for name, config in self.size_configs.items()}

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """The architecture of a config.json in current names; UserError names a field that is not understood."""
        given = Fields(config)
        try:
            architecture = self.read(given)
        except UserError:
            raise
        except (ValueError, ArithmeticError) as error:  # the architecture's own checks; a divisor that is zero
            raise UserError(f"config.json: {error}") from None
        given.finish(self.name)
        return architecture
