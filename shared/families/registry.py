"""Registry of families: config.json to family and architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture, Attention, LatentAttention, Layer
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.manifest import MANIFEST
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
    gemma3_multimodal,
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
from shared.families.common.decoder import with_mixer
from shared.families.common.mtp import mtp_part
from shared.families.family import Family
from shared.mapping.rule import Table

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
    gemma3_multimodal,
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
    """Names of all families."""
    return list(FAMILIES)


def sizes() -> dict[str, Architecture]:
    """All named sizes of all families."""
    return {name: size for family in FAMILIES.values() for name, size in family.sizes.items()}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError names the nearest supported model_type."""
    classes = config.get("architectures")
    name = config.get("model_type")
    if not isinstance(classes, list | None):
        raise UserError(f"config.json: architectures is {classes!r}; a list of one class is required")
    if name is None and classes:  # some first uploads have `architectures` only
        name = next((f.model_types[0] for f in FAMILIES.values() if classes == [f.hf_class]), None)
    types = [kind for family in FAMILIES.values() for kind in family.model_types]
    if name is None:
        raise UserError("config.json: model_type is missing; add the model_type of the family")
    if name not in types:
        near = get_close_matches(str(name), types, n=1, cutoff=0.3)
        raise UserError(
            f"config.json: model_type {name!r} is not a supported family"
            f"{f'; the nearest is {near[0]}' if near else ''} (supported: {', '.join(dict.fromkeys(types))})"
        )
    named = [family for family in FAMILIES.values() if name in family.model_types]
    found = [family for family in named if family.matches(config)]
    if not found:
        raise UserError(
            f"config.json: model_type is {name}, but the fields match none of its families: "
            f"{', '.join(family.title for family in named)}"
        )
    (family,) = found
    if classes and classes not in [[name] for name in family.classes]:
        raise UserError(f"config.json: architectures {classes} is not supported; supported: {family.hf_class}")
    return family


def from_config(config: Mapping[str, Any], ignored: Collection[str] = ()) -> Architecture:
    """The architecture of a config.json written by transformers 4 or 5.

    Args:
        config: its fields.
        ignored: unknown fields that are passed over.

    Raises:
        UserError: an unsupported field, by name.
    """
    family = family_of(config)
    # quantization_config says how weights are stored, if they still are: readers of weights check it.
    given = family.without_legacy_names(config)
    return family.architecture({name: value for name, value in given.items() if name != "quantization_config"}, ignored)


def unread_rates(config: Mapping[str, Any]) -> dict[str, float]:
    """Dropout rates of a config.json that its family does not read, and training does not use."""
    family = family_of(config)
    return family.unread_rates(family.without_legacy_names(config))


def check_ignored(config: Mapping[str, Any], ignored: Collection[str]) -> None:
    """UserError for a name of --ignore-config-field that config.json lacks."""
    inside = [f"{name}.{field}" for name, part in config.items() if isinstance(part, dict) for field in part]
    for name in ignored:
        if name not in config and name not in inside:
            raise UserError(f"--ignore-config-field {name}: config.json has no such field; leave it out")


def recorded_ignored(directory: Path) -> tuple[str, ...]:
    """Fields that were passed over when the directory of config.json was made, from its manifest."""
    places = (directory, directory.parent) if directory.name == "hf" else (directory,)
    manifest = next((place / MANIFEST for place in places if (place / MANIFEST).is_file()), None)
    if manifest is None:
        return ()
    facts = read_config(manifest).get("facts") or {}
    return tuple(facts.get("ignored_config_fields", ()))


def with_auxiliary_fields(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """config.json with missing fields filled from auxiliary files in `directory`."""
    found = family_of(config).auxiliary_fields(directory)
    return {**config, **{name: value for name, value in found.items() if config.get(name) is None}}


def from_files(directory: Path, ignored: Collection[str] = (), **changes: Any) -> Architecture:
    """The architecture of a Hugging Face directory: config.json updated by `changes`, and auxiliary files.

    Fields that the directory's manifest says were passed over are passed over again, and those in `ignored`.

    Raises:
        UserError: as `from_config`; config.json is missing.
    """
    config = with_auxiliary_fields(read_config(directory / "config.json") | changes, directory)
    return from_config(config, {*ignored, *recorded_ignored(directory)})


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json, also of unsupported families."""
    known = (f for f in FAMILIES.values() if config.get("model_type") in f.model_types and f.matches(config))
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
        "pad_token_id": None,  # the default of some classes exceeds a small vocabulary
        **further,
    }


def as_family(architecture: Architecture, name: str) -> Architecture:
    """The same architecture under another family's config.json and tensor names (`--family`).

    Dropped: dynamic RoPE scaling (no effect up to `max_position_embeddings`) and the vision tower. NormHead becomes a
    plain head: the caller must store the normalised rows.

    Raises:
        UserError: the other family lacks a field of this model, by name.
    """
    if name not in FAMILIES:
        raise UserError(f"--family {name} is unknown; known: {', '.join(FAMILIES)}")
    head = replace(architecture.head, normalized=False)
    same = replace(architecture, family=name, head=head, vision=None).with_layers(_without_dynamic_scaling)
    fix = f"omit --family to write it as {architecture.family}"
    parts, known = _parts(same), [_parts(size) for size in FAMILIES[name].sizes.values()]
    difference = next(
        ((part, kind) for part, kind in parts.items() if all(other[part] != kind for other in known)), None
    )
    if difference is None:
        try:
            read = from_config(to_config(same))
        except ValueError as error:
            raise UserError(
                f"--family {name} cannot represent this {architecture.family} model: {error}; {fix}"
            ) from None
        difference = first_difference(same, read)
    if difference:
        what = f"{difference[0]} is {difference[1]!r}"
        raise UserError(f"--family {name} cannot represent this {architecture.family} model: {what}; {fix}")
    return same


def _without_dynamic_scaling(layer: Layer) -> Layer:
    rotary = layer.mixer.rotary if isinstance(layer.mixer, Attention | LatentAttention) else None
    if not rotary or not rotary.scaling or rotary.scaling.kind != "dynamic":
        return layer
    return with_mixer(layer, rotary=replace(rotary, scaling=None))


def _parts(a: Architecture) -> dict[str, Any]:
    """Properties that all models of a family share and its `write` takes for granted."""
    mixers = [kind.mixer for kind in a.kinds]
    attention = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    layer = a.layers[0]
    return {
        "attention": sorted({type(mixer).__name__ for mixer in mixers}),
        "rotary": any(mixer.rotary for mixer in attention),
        "alibi": next((mixer.alibi.rounded for mixer in attention if mixer.alibi), None),
        "qk_norm": next((mixer.qk_norm for mixer in attention), None),
        "softmax scale": a.attention.scale is not None,
        "MoE": a.moe is not None,
        "shared experts": a.moe is not None and a.moe.shared is not None,
        "activation": a.feed_forward.activation,
        "norm": (layer.norm.kind, layer.norm.zero_centered_gamma),
        "norm_placement": layer.norm_placement,
        "residual": layer.residual.kind,
        "learned positions": a.embedding.positions is not None,
        "prefix LM": a.prefix is not None,
        "vision tower": a.vision is not None,
    }


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any] | None:
    """Path and value in `a` of the first field that differs from `b`; None if equal."""
    if a == b:
        return None
    if is_dataclass(a) and type(a) is type(b):
        inner = ((field.name, getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
        return next(found for name, one, other in inner if (found := first_difference(one, other, f"{path}.{name}")))
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next(found for i, (one, other) in pairs if (found := first_difference(one, other, f"{path}[{i}]")))
    return path.removeprefix("."), a


def drop_missing_mtp(architecture: Architecture, names: Collection[str]) -> Architecture:
    """The architecture without MTP if the checkpoint (Hugging Face or Megatron names) has no MTP tensor."""
    further = mtp_part(table_of(architecture)).entries()
    if any(entry.key in names or any(source.name in names for source in entry.sources) for entry in further):
        return architecture
    return replace(architecture, mtp=None)


def table_of(architecture: Architecture) -> Table:
    """The tensor table of an architecture: Hugging Face names to Megatron keys."""
    return FAMILIES[architecture.family].table(architecture)
