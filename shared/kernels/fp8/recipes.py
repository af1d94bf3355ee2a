"""Recipes of FP8 training: one description for every backend. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["tensorwise", "delayed", "rowwise", "blockwise", "mxfp8"]
Fp8Format = Literal["hybrid", "e4m3"]
Kind = Literal["activations", "weights", "gradients"]
KINDS: tuple[Kind, ...] = ("activations", "weights", "gradients")
AMAX_HISTORY = 1024  # updates; TransformerEngine's default

_MXFP8_CAPABILITY = (10, 0)  # first compute capability whose matrix units read MXFP8
_FP8_CAPABILITY = (8, 9)  # first compute capability with FP8 matrix units


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How the linear layers of a model are computed in FP8.

    A scale is what a code is multiplied by: amax / 448 (E4M3) or amax / 57344 (E5M2), arXiv:2209.05433. Recipes differ in which
    elements share one, and in the amax that it is made of:

    - tensorwise: the whole tensor, of its own amax ("current scaling").
    - delayed: the whole tensor, of the highest amax of the last `amax_history` updates (arXiv:2209.05433; TransformerEngine's
      `DelayedScaling`, algorithm `max`). A history of 1 is its algorithm `most_recent`.
    - rowwise: one row or column along which a product sums up; torch's `_scaled_mm` and torchao call it so.
    - blockwise: 1 x 128 elements of activations and gradients, 128 x 128 of weights, in the direction of the sum; DeepSeek-V3,
      arXiv:2412.19437, section 3.3.
    - mxfp8: 32 elements with a power of two (OCP Microscaling Formats 1.0; arXiv:2310.10537). Only where the GPU multiplies it.

    Attributes:
        name: of the recipe.
        format: hybrid: gradients in E5M2, weights and activations in E4M3; e4m3: all in E4M3.
        amax_history: updates; only the delayed recipe has one.
        power_of_two_scales: round scales up to powers of two: then scaling itself rounds nothing.
        bf16_layers: first and last decoder layers that stay in bf16.
    """

    name: RecipeName
    format: Fp8Format
    amax_history: int
    power_of_two_scales: bool
    bf16_layers: tuple[int, int]

    def in_fp8(self, layer: int, num_layers: int) -> bool:
        """Whether the linear layers of a layer are in FP8. `layer`: from 0; MTP layers, from num_layers on, are."""
        first, last = self.bf16_layers
        return first <= layer < num_layers - last or layer >= num_layers

    @property
    def scales_of_tensors(self) -> bool:
        """Whether a tensor has a single scale."""
        return self.name in ("tensorwise", "delayed")

    def obstacle(self, device: str, capability: tuple[int, int] | None = None) -> str | None:
        """Why a device does not compute this recipe with torch's own products, as a clause; None if it does.

        Args:
            device: cpu or cuda.
            capability: compute capability of the GPU.
        """
        if self.name == "mxfp8":
            if device == "cpu" or capability is None or capability < _MXFP8_CAPABILITY:
                return "MXFP8 needs a GPU of compute capability 10.0 or higher"
            return "MXFP8 products are not among those of the local backend"
        if device == "cuda" and (capability is None or capability < _FP8_CAPABILITY):
            return "FP8 needs a GPU of compute capability 8.9 or higher"
        return None

    def __str__(self) -> str:
        gradients = "gradients in E5M2, the rest in E4M3" if self.format == "hybrid" else "all in E4M3"
        scale = {
            "tensorwise": "a scale per tensor, of its own amax",
            "delayed": f"a scale per tensor, of the amax of {self.amax_history} updates",
            "rowwise": "a scale per row",
            "blockwise": "a scale per 1 x 128 activations and gradients, per 128 x 128 weights",
            "mxfp8": "a scale per 32 elements",
        }[self.name]
        return f"{self.name}, {scale}{', a power of two' * self.power_of_two_scales}; {gradients}"
