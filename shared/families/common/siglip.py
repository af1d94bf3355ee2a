"""SigLIP vision tower: config.json fields and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.architecture.vision import Vision
from shared.errors import UserError
from shared.families.common.fields import Fields
from shared.mapping.layout import Shape
from shared.mapping.rule import PassThroughTensor

MODEL_TYPE = "siglip_vision_model"


def read(fields: Fields) -> Vision:
    """Defaults: transformers' SiglipVisionConfig. Fields without effect on tensor shapes are not read."""
    fields.expect("model_type", MODEL_TYPE, why="the vision tower of this family must be SigLIP")
    if fields.get("vision_use_head", bool, True):
        raise UserError("config.json: vision_config.vision_use_head is true; this family's vision tower has no head")
    vision = Vision(
        num_layers=fields.get("num_hidden_layers", int, 12),
        hidden_size=fields.get("hidden_size", int, 768),
        ffn_hidden_size=fields.get("intermediate_size", int, 3072),
        num_attention_heads=fields.get("num_attention_heads", int, 12),
        image_size=fields.get("image_size", int, 224),
        patch_size=fields.get("patch_size", int, 16),
        num_channels=fields.get("num_channels", int, 3),
    )
    if vision.image_size < vision.patch_size:
        raise UserError(
            f"config.json: vision_config has patches of {vision.patch_size} pixels in images of {vision.image_size}"
        )
    return vision


def write(vision: Vision) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.num_channels,
        "vision_use_head": False,
    }


def tensors(vision: Vision, prefix: str) -> Iterator[PassThroughTensor]:
    """All tensors of the tower, named with `prefix`."""
    hidden, ffn, layers = vision.hidden_size, vision.ffn_hidden_size, tuple(range(vision.num_layers))

    def both(name: str, *shape: int, each: bool = False) -> Iterator[PassThroughTensor]:
        """A weight and its bias."""
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            yield one(f"{name}.{kind}", size, each)

    def one(name: str, shape: Shape, each: bool = False) -> PassThroughTensor:
        if each:
            return PassThroughTensor(name=f"{prefix}encoder.layers.{{layer}}.{name}", layers=layers, shape=shape)
        return PassThroughTensor(name=prefix + name, axes=(), shape=shape)

    patch, patches = vision.patch_size, (vision.image_size // vision.patch_size) ** 2
    yield from both("embeddings.patch_embedding", hidden, vision.num_channels, patch, patch)
    yield one("embeddings.position_embedding.weight", (patches, hidden))
    for name in ("layer_norm1", "layer_norm2"):
        yield from both(name, hidden, each=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from both(f"self_attn.{name}", hidden, hidden, each=True)
    yield from both("mlp.fc1", ffn, hidden, each=True)
    yield from both("mlp.fc2", hidden, ffn, each=True)
    yield from both("post_layernorm", hidden)
