"""FP8 as a wrapper of a backend: linear layers in FP8, all else as the backend below has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules

from shared.architecture.architecture import Attention, Norm
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.model.backend import Backend
from shared.model.fp8_linear import Direction, fp8_class
from shared.model.norm import NormBuilder


class Fp8Backend:
    """A backend whose linear layers are in FP8, but for the recipe's first and last decoder layers.

    Embedding, output layer, router, norms and core attention are never asked for here: they stay in bf16.
    """

    def __init__(self, inner: Backend, recipe: Fp8Recipe, num_layers: int, *, joins_norms: bool = False) -> None:
        """
        Args:
            inner: the backend whose linear layers are derived from.
            recipe: of FP8.
            num_layers: decoder layers of the model.
            joins_norms: RMSNorms are part of the linear layer that alone reads them: not with adapters, which read them, too.
        """
        self.inner, self.recipe, self.num_layers, self.joins_norms = inner, recipe, num_layers, joins_norms
        self.attention_backend: AttentionBackend | None = inner.attention_backend

    def config_fields(self) -> dict[str, Any]:
        return self.inner.config_fields()

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return self._linear(self.inner.column_parallel_linear(layer, expert=expert), layer, "column")

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return self._linear(self.inner.row_parallel_linear(layer, expert=expert), layer, "row")

    def _linear(self, base: type, layer: int, direction: Direction) -> type:
        return fp8_class(base, self.recipe, layer, direction) if self.recipe.in_fp8(layer, self.num_layers) else base

    def column_parallel_layer_norm_linear(self, norm: Norm, layer: int) -> type | None:
        if not (
            self.joins_norms and norm.kind == "rmsnorm" and norm.affine and self.recipe.in_fp8(layer, self.num_layers)
        ):
            return None
        built = norm, self.inner.norm(norm, extra_state=False)
        return fp8_class(self.inner.column_parallel_linear(layer), self.recipe, layer, "column", built)

    def norm(self, norm: Norm, *, extra_state: bool) -> NormBuilder:
        return self.inner.norm(norm, extra_state=extra_state)

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        return self.inner.qk_norms(attention, norm)

    def core_attention(self) -> type:
        return self.inner.core_attention()

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        return self.inner.grouped_mlp_modules(submodules)

    def embedding(self) -> type:
        return self.inner.embedding()

    def output_layer(self) -> type:
        return self.inner.output_layer()
