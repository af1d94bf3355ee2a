"""Families, and which of them a Hugging Face configuration is of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.errors import UserError
from shared.families import (
    baichuan,
    bloom,
    chatglm,
    chatglm2,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma3_images,
    glm,
    glm4,
    glm4_moe,
    glm10b,
    glm130b,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    internlm,
    internlm2,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    olmo3,
    opt,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
    smollm3,
    stablelm,
    starcoder2,
    yi,
)
from shared.families.common.fields import Fields
from shared.families.common.mtp import of_prediction
from shared.families.family import Family
from shared.mapping.rule import Table
from shared.quantized.scheme import quantization_scheme

_MODULES = (
    llama,
    yi,
    internlm,
    internlm2,
    baichuan,
    mistral,
    mixtral,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    gemma,
    gemma2,
    gemma3,
    gemma3_images,
    phi3,
    glm,
    glm4,
    glm4_moe,
    glm10b,
    glm130b,
    chatglm,
    chatglm2,
    olmo2,
    olmo3,
    smollm3,
    granite,
    stablelm,
    cohere,
    cohere2,
    starcoder2,
    gpt_bigcode,
    falcon,
    bloom,
    gpt_neox,
    gptj,
    opt,
    gpt2,
    mpt,
)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def names() -> list[str]:
    """Every supported family."""
    return list(FAMILIES)


def sizes() -> dict[str, Architecture]:
    """Every named size of every family."""
    return {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError names the nearest one that is supported."""
    classes = config.get("architectures")
    name = config.get("model_type")
    if not isinstance(classes, list | None):
        raise UserError(f"config.json: architectures is {classes!r}; a list of one class is wanted")
    if name is None and classes:  # as first published, with code of their own, by some
        name = next((f.model_types[0] for f in FAMILIES.values() if classes == [f.hf_class]), None)
    types = [kind for family in FAMILIES.values() for kind in family.model_types]
    if name is None:
        raise UserError("config.json: model_type is missing, which says of which family the model is")
    if name not in types:
        near = get_close_matches(str(name), types, n=1, cutoff=0.3)
        raise UserError(
            f"config.json: model_type {name!r} is not a supported family"
            f"{f'; the nearest is {near[0]}' if near else ''} (supported: {', '.join(dict.fromkeys(types))})"
        )
    named = [family for family in FAMILIES.values() if name in family.model_types]
    found = [family for family in named if family.claims(config)]
    if not found:
        raise UserError(
            f"config.json: this model of model_type {name} is none of {', '.join(family.title for family in named)}"
        )
    (family,) = found
    if classes and classes not in [[name] for name in family.classes]:
        raise UserError(f"config.json: architectures {classes} is not supported; wanted: {family.hf_class}")
    return family


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json describes, in transformers 4's or 5's spelling.

    Raises:
        UserError: a field asks for something that is not computed here, by name.
    """
    family = family_of(config)
    quantization_scheme(config)  # says how weights are stored, not what is computed: known, or refused
    today = family.today(config)
    given = Fields({name: value for name, value in today.items() if name != "quantization_config"})
    try:
        architecture = family.read(given)
    except UserError:
        raise
    except (ValueError, ArithmeticError) as error:  # the architecture's own checks; a divisor that is zero
        raise UserError(f"config.json: {error}") from None
    given.finish(family.name)
    return architecture


def completed(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """A config.json with the fields that its family finds in other files of its folder, where it lacks them."""
    found = family_of(config).beside(directory)
    return {**config, **{name: value for name, value in found.items() if config.get(name) is None}}


def from_files(directory: Path, **changes: Any) -> Architecture:
    """The architecture of the model in a folder: what config.json, with `changes` of it, and the files beside it say.

    Raises:
        UserError: as `from_config`; there is no config.json.
    """
    return from_config(completed(read_config(directory / "config.json") | changes, directory))


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model, of families that are not supported too."""
    known = (f for f in FAMILIES.values() if config.get("model_type") in f.model_types and f.claims(config))
    family = next(known, None)
    return family.language(config) if family else config.get("text_config", config)


def to_config(architecture: Architecture, **further: Any) -> dict[str, Any]:
    """A config.json for a new model; `further` fields are added as they are (token ids, dtype)."""
    family = FAMILIES[architecture.family]
    return {
        "architectures": [family.hf_class],
        "model_type": family.model_types[0],
        **family.write(architecture),
        "use_cache": True,
        "pad_token_id": None,  # some classes have a default beyond a small vocabulary
        **further,
    }


def as_family(architecture: Architecture, name: str) -> Architecture:
    """The same model as one of another family, whose configuration and tensor names programs may know better.

    Dynamic rotary scaling is left out, which changes nothing up to `max_position_embeddings`, and so is what is beside
    the language model. A head that divides its rows by their lengths is one whose rows are so divided, by whoever writes
    them.

    Raises:
        UserError: the other family cannot say something of this model, by name.
    """
    if name not in FAMILIES:
        raise UserError(f"--family {name} is unknown; known: {', '.join(FAMILIES)}")
    scaling = architecture.rope_scaling
    scaling = None if scaling and scaling.kind == "dynamic" else scaling
    same = replace(architecture, family=name, rope_scaling=scaling, normalized_head=False, vision=None)
    mend = f"leave --family out, and it is written as {architecture.family}"
    known = [_structure(size) for size in FAMILIES[name].sizes.values()]
    different = [field for field, kind in _structure(same).items() if all(other[field] != kind for other in known)]
    if not different:
        try:
            read = from_config(to_config(same))
        except ValueError as error:
            raise UserError(f"--family {name} cannot be this {architecture.family} model: {error}; {mend}") from None
        different = [
            field.name for field in fields(same.flat) if getattr(same, field.name) != getattr(read, field.name)
        ]
    if different:
        what = f"whose {different[0]} is {getattr(same, different[0])!r}"
        raise UserError(f"--family {name} cannot be this {architecture.family} model, {what}; {mend}")
    return same


def _structure(architecture: Architecture) -> dict[str, Any]:
    """Kinds of parts, by field: what members of a family have in common, and the writer of its configuration expects."""

    def kind(value: Any) -> Any:
        if is_dataclass(value):
            return [field.name for field in fields(value) if getattr(value, field.name) is not None]
        return value if isinstance(value, str) else None

    named = (field.name for field in fields(architecture.flat) if field.name not in ("family", "rope_scaling"))
    return {name: kind(getattr(architecture, name)) for name in named}


def as_stored(architecture: Architecture, names: Collection[str]) -> Architecture:
    """The model without layers for tokens further ahead where none of their tensors is among the names, in either form.

    Some files are published without; what has some of them has to have all.
    """
    further = of_prediction(table_of(architecture)).entries()
    if any(entry.key in names or any(source.name in names for source in entry.sources) for entry in further):
        return architecture
    return replace(architecture, prediction_layers=0)


def table_of(architecture: Architecture) -> Table:
    """Its tensors in both forms."""
    return FAMILIES[architecture.family].table(architecture)
