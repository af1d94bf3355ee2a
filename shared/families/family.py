"""`Family`: the description of one model family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.families.common.tensor_table import Names, decoder_table
from shared.mapping.rule import Table

# A tiny model for tests and first steps, in LLaMA's field names: 2 layers, 512 tokens.
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
    """A model family: config.json to Architecture and back, and the tensor table."""

    name: str
    title: str  # model names, for FAMILIES.md and messages
    hf_class: str  # `architectures` of config.json
    other_classes: tuple[str, ...] = ()  # other published names of that class
    remote: bool = False  # trust_remote_code: the class is published with the model, not in transformers
    explicit_positions: bool = False  # forward() takes positions and mask as arguments (prefix LM)
    model_types: tuple[str, ...] = ()  # `model_type` of config.json; the first is written; empty: `name`
    # Whether a config.json is this family's, if several families share a model_type.
    matches: Callable[[Mapping[str, Any]], bool] = lambda config: True
    # config.json with current field names instead of those of the first uploads.
    without_legacy_names: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    # config.json fields read from auxiliary files, for a config.json that lacks them.
    auxiliary_fields: Callable[[Path], Mapping[str, Any]] = lambda directory: {}
    # The language model's part of a multimodal config.json.
    language: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    read: Callable[[Fields], Architecture]
    names: Names = field(default_factory=Names)  # tensor names
    # Tensor table; None: `decoder_table` with `names`.
    own_table: Callable[[Architecture], Table] | None = None
    write: Callable[[Architecture], dict[str, Any]]  # the family's own fields of a new config.json
    # Named sizes of `convert init`: config.json fields that differ from the class defaults.
    size_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_types", self.model_types or (self.name,))

    @property
    def classes(self) -> tuple[str, ...]:
        """`hf_class` and `other_classes`."""
        return (self.hf_class, *self.other_classes)

    def table(self, a: Architecture) -> Table:
        """Tensor table: Hugging Face names to Megatron keys."""
        return self.own_table(a) if self.own_table else decoder_table(a, self.names)

    @cached_property
    def sizes(self) -> Mapping[str, Architecture]:
        """The named sizes."""
        return {name: self.architecture(config) for name, config in self.size_configs.items()}

    def architecture(self, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Architecture:
        """The architecture of a config.json with current field names; UserError for an unsupported field.

        `ignored`: unknown fields that are passed over.
        """
        given = Fields(config, ignored)
        architecture = self._read(given)
        given.finish(self.name)
        return architecture

    def unread_rates(self, config: Mapping[str, Any]) -> dict[str, float]:
        """Dropout rates of a config.json that the family does not read."""
        given = Fields(config)
        self._read(given)
        return given.unread_rates()

    def _read(self, given: Fields) -> Architecture:
        try:
            return self.read(given)
        except UserError:
            raise
        except (ValueError, ArithmeticError) as error:  # Architecture's checks; division by zero
            raise UserError(f"config.json: {error}") from None
