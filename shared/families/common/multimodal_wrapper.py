"""Multimodal wrapper: a language model of another family with a vision tower.

Vision tower and projector are pass-through tensors. The wrapper adds `text_config` and `vision_config`, name prefixes, and
the list of pass-through tensors.
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
PREFIX = "language_model."  # of the language model's tensor names

# Name prefixes: published and written by save_pretrained -> in the state dict of the transformers class.
PREFIX_VARIANTS: PrefixVariants = {
    f"{PREFIX}model.": ("model.language_model.",),
    f"{PREFIX}lm_head.": ("lm_head.",),
    "multi_modal_projector.": ("model.multi_modal_projector.",),
}


@dataclass(frozen=True, kw_only=True)
class MultimodalWrapper:
    """What a wrapper adds to the family of its language model."""

    inner: Family
    model_type: str
    defaults: Mapping[str, Any]  # class defaults of absent `text_config` fields
    refused: Mapping[str, str]  # `text_config` fields that must be unset: name -> reason
    ignored: tuple[str, ...]  # the wrapper's fields without effect on the language model
    fields: Mapping[str, Any]  # values of `ignored` in a new config.json
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
                f"config.json: {_TIED} is false, but true in {_TEXT}; runtimes read one or the other: keep the right one"
            )
        language = self.inner.without_legacy_names(self.language({_TEXT: text, _TIED: tied}))
        inside = Fields(language, given.ignored, within=f"{_TEXT}.")
        inside.expect("model_type", *self.inner.model_types, why=f"the language model must be {self.inner.name}")
        for field, why in self.refused.items():
            inside.expect(field, why=why)
        architecture = self.inner.read(inside)
        inside.finish(f"{self.inner.name} ({_TEXT})")
        return replace(architecture, family=name, vision=self.read(Fields(vision)))

    def language(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's config.json, with class defaults filled in."""
        given = {_TIED: config.get(_TIED), **config.get(_TEXT, {})}
        return {**self.defaults, **{field: value for field, value in given.items() if value is not None}}

    def table(self, a: Architecture) -> Table:
        """The language model's table with prefixed names, and the pass-through tensors."""
        assert a.vision is not None
        table = self.inner.table(a).renamed(lambda name: PREFIX + name)
        return replace(
            table,
            pass_through=(*table.pass_through, *self.pass_through(a, a.vision)),
            prefix_variants=self.prefix_variants,
        )

    def config(self, a: Architecture) -> dict[str, Any]:
        """The family's fields of a new config.json."""
        assert a.vision is not None
        text = {"model_type": self.inner.model_types[0], **self.inner.write(a), "pad_token_id": None}
        return {_TEXT: text, _VISION: self.write(a.vision), **self.fields, _TIED: a.head.tied}


def wrapper_family(
    wrapper: MultimodalWrapper, *, name: str, title: str, hf_class: str, size_configs: Mapping[str, Mapping[str, Any]]
) -> Family:
    """The `Family` of a wrapper."""
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
    """config.json with `tie_word_embeddings` false, in `text_config`, too."""
    inside = {_TEXT: config[_TEXT] | {_TIED: False}} if _TEXT in config else {}
    return {**config, **inside, _TIED: False}
