"""Gemma 3, multimodal (4B, 12B, 27B): the text model in a wrapper with a SigLIP vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.vision import Vision
from shared.families import gemma3
from shared.families.common import siglip
from shared.families.common.multimodal_wrapper import PREFIX_VARIANTS, MultimodalWrapper, wrapper_family
from shared.mapping.rule import PassThroughTensor

_TOWER = "vision_tower.vision_model."


def _pass_through(a: Architecture, vision: Vision) -> Iterator[PassThroughTensor]:
    """Vision tower and projector: a norm, then a `[vision, text]` weight."""
    projector = "multi_modal_projector.mm_"
    shapes = {
        "input_projection_weight": (vision.hidden_size, a.hidden_size),
        "soft_emb_norm.weight": (vision.hidden_size,),
    }
    yield from (PassThroughTensor(name=projector + name, axes=(), shape=shape) for name, shape in shapes.items())
    yield from siglip.tensors(vision, _TOWER)


_TOKENS = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144}
_WRAPPER = MultimodalWrapper(
    inner=gemma3.FAMILY,
    model_type="gemma3",
    # Gemma3TextConfig's defaults: the published 4B omits most fields.
    defaults={
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
    },
    refused={"final_logit_softcapping": "transformers does not cap the logits of this class, other runtimes do"},
    ignored=(*_TOKENS, "mm_tokens_per_image", "initializer_range"),
    fields={**_TOKENS, "mm_tokens_per_image": 256},
    read=siglip.read,
    write=siglip.write,
    pass_through=_pass_through,
    # transformers 5 drops `vision_model.` from the names.
    prefix_variants={
        **PREFIX_VARIANTS,
        _TOWER: ("vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
    },
)
_SO400M = {
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def _size(text: str) -> dict[str, Any]:
    return {"text_config": gemma3.FAMILY.size_configs[text], "vision_config": _SO400M}


FAMILY = wrapper_family(
    _WRAPPER,
    name="gemma3_images",
    title="Gemma 3 with images (4B, 12B, 27B; MedGemma 4B)",
    hf_class="Gemma3ForConditionalGeneration",
    size_configs={
        "gemma3-images-tiny": {
            "text_config": {**gemma3.FAMILY.size_configs["gemma3-tiny"], "final_logit_softcapping": None},
            "vision_config": {
                **_SO400M,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_attention_heads": 2,
                "image_size": 224,
            },
        },
        "gemma-3-4b": _size("gemma-3-4b-text"),
        "gemma-3-12b": _size("gemma-3-12b-text"),
        "gemma-3-27b": _size("gemma-3-27b-text"),
    },
)
