"""Gemma 3 as its larger sizes are published: the text model inside one that sees images, with SigLIP's vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.vision import Vision
from shared.families import gemma3
from shared.families.common import siglip
from shared.families.common.multimodal_wrapper import SPELLINGS, Whole, family_of_whole
from shared.mapping.rule import PassThroughTensor

_TOWER = "vision_tower.vision_model."


def _beside(a: Architecture, vision: Vision) -> Iterator[PassThroughTensor]:
    """The tower, and what projects its vectors: `[vision, text]`, after a norm."""
    projector = "multi_modal_projector.mm_"
    shapes = {
        "input_projection_weight": (vision.hidden_size, a.hidden_size),
        "soft_emb_norm.weight": (vision.hidden_size,),
    }
    yield from (PassThroughTensor(name=projector + name, axes=(), shape=shape) for name, shape in shapes.items())
    yield from siglip.tensors(vision, _TOWER)


_TOKENS = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144}
_WHOLE = Whole(
    inner=gemma3.FAMILY,
    model_type="gemma3",
    # Gemma3TextConfig's: the published 4B leaves most of them out.
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
    refused={"final_logit_softcapping": "transformers does not cap the logits of this class, other programs do"},
    unread=(*_TOKENS, "mm_tokens_per_image", "initializer_range"),
    fields={**_TOKENS, "mm_tokens_per_image": 256},
    read=siglip.read,
    write=siglip.write,
    beside=_beside,
    # transformers 5 has no `vision_model` in the tower's names.
    prefix_variants={
        **SPELLINGS,
        _TOWER: ("vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
    },
)
_SO400M = Vision(
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    num_attention_heads=16,
    image_size=896,
    patch_size=14,
    num_channels=3,
)


def _seeing(text: str, vision: Vision = _SO400M) -> Architecture:
    return replace(gemma3.FAMILY.sizes[text], vision=vision)


_TINY: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}

FAMILY = family_of_whole(
    _WHOLE,
    name="gemma3_images",
    title="Gemma 3 with images (4B, 12B, 27B; MedGemma 4B)",
    hf_class="Gemma3ForConditionalGeneration",
    sizes={
        "gemma3-images-tiny": replace(
            _seeing("gemma3-tiny", replace(_SO400M, **_TINY, image_size=224)), logit_softcap=None
        ),
        "gemma-3-4b": _seeing("gemma-3-4b-text"),
        "gemma-3-12b": _seeing("gemma-3-12b-text"),
        "gemma-3-27b": _seeing("gemma-3-27b-text"),
    },
)
