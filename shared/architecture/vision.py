"""Sizes of what makes vectors of images beside a language model.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vision:
    """A tower of layers over an image's patches, and what projects its vectors to the language model's.

    It is kept as it is and never computed here; the sizes say which tensors a checkpoint has of it.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int  # pixels, either way
    patch_size: int  # pixels, either way
    num_channels: int
