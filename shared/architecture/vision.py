"""Sizes of a vision tower.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Vision tower (ViT) and projector of a multimodal wrapper: pass-through tensors only.

    Neither is trained or run. The sizes determine the names and shapes of their tensors.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int  # pixels, height = width
    patch_size: int  # pixels, height = width
    num_channels: int
