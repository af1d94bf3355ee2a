"""A multimodal wrapper: a language model with a vision tower beside it, as models that see images are published.

The language model is of a family that is described by itself; vision tower and projector are kept as pass-through tensors.
A wrapper says where the configurations are (`text_config`, `vision_config`), what names begin with, and which tensors pass
through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.vision import Vision
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.families.family import Family
from shared.mapping.rule import PassThroughTensor, PrefixVariants, Table

_TEXT, _VISION, _TIED = "text_config", "vision_config", "tie_word_embeddings"
PREFIX = "language_model."  # of the language model's own names

# Prefixes of names: as published and as transformers writes them, then as its class names them.
PREFIX_VARIANTS: PrefixVariants = {
    f"{PREFIX}model.": ("model.language_model.",),
    f"{PREFIX}lm_head.": ("lm_head.",),
    "multi_modal_projector.": ("model.multi_modal_projector.",),
}


@dataclass(frozen=True, kw_only=True)
class MultimodalWrapper:
    """What a wrapper adds to the family of the language model in it."""

    inner: Family
    model_type: str
    defaults: Mapping[str, Any]  # of fields that `text_config` leaves out, as its class has them
    refused: Mapping[str, str]  # fields of `text_config` that must not be set here, and why
    ignored: tuple[str, ...]  # the wrapper's own fields, which say nothing of the language model
    fields: Mapping[str, Any]  # of those, what a new configuration says
    read: Callable[[Fields], Vision]  # of `vision_config`
    write: Callable[[Vision], dict[str, Any]]
    pass_through: Callable[[Architecture, Vision], Iterable[PassThroughTensor]]
    prefix_variants: PrefixVariants

    def architecture(self, name: str, given: Fields) -> Architecture:
        """The language model, with the sizes of the vision tower."""
        given.ignore(*self.ignored)
        text, vision = given.get(_TEXT, dict), given.get(_VISION, dict)
        tied, own = given.optional(_TIED, bool), text.get(_TIED)
        if tied is False and own is True:
            raise UserError(
                f"config.json: {_TIED} is false, and true in {_TEXT}: programs disagree on which counts; keep the right one"
            )
        inside = Fields(self.inner.without_legacy_names(self.language({_TEXT: text, _TIED: tied})))
        inside.expect("model_type", *self.inner.model_types, why="the language model of this family is another")
        for field, why in self.refused.items():
            inside.expect(field, why=why)
        architecture = self.inner.read(inside)
        inside.finish(f"{self.inner.name} ({_TEXT})")
        return replace(architecture, family=name, vision=self.read(Fields(vision)))

    def language(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's configuration, complete where its class has defaults."""
        given = {_TIED: config.get(_TIED), **config.get(_TEXT, {})}
        return {**self.defaults, **{field: value for field, value in given.items() if value is not None}}

    def table(self, a: Architecture) -> Table:
        """The language model's tensors, and those that pass through."""
        assert a.vision is not None
        table = self.inner.table(a).renamed(lambda name: PREFIX + name)
        return replace(
            table,
            pass_through=(*table.pass_through, *self.pass_through(a, a.vision)),
            prefix_variants=self.prefix_variants,
        )

    def config(self, a: Architecture) -> dict[str, Any]:
        """A new configuration's own fields."""
        assert a.vision is not None
        text = {"model_type": self.inner.model_types[0], **self.inner.write(a), "pad_token_id": None}
        return {_TEXT: text, _VISION: self.write(a.vision), **self.fields, _TIED: a.head.tied}


def wrapper_family(
    wrapper: MultimodalWrapper, *, name: str, title: str, hf_class: str, size_configs: Mapping[str, Mapping[str, Any]]
) -> Family:
    """The family of the wrapper."""
    return Family(
        name=name,
        model_types=(wrapper.model_type,),
        title=title,
        hf_class=hf_class,
        language=wrapper.language,
        read=lambda fields: wrapper.architecture(name, fields),
        own_table=wrapper.table,
        write=wrapper.config,
        size_configs=size_configs,
    )


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose embedding and output head are two tensors, wherever it says so."""
    inside = {_TEXT: config[_TEXT] | {_TIED: False}} if _TEXT in config else {}
    return {**config, **inside, _TIED: False}
