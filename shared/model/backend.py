"""Backend: the implementation of linear layers, norms and core attention that a model is built from.

Like Megatron-Core's `BackendSpecProvider` (megatron/core/models/backends.py), with the same method names and more
arguments: linear layers by layer index and expert or dense, so that precision or adapters can differ; norms by `Norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import MLPSubmodules

from shared.architecture.architecture import Attention, Norm
from shared.kernels.attention.names import AttentionBackend
from shared.model.attention import CoreAttention
from shared.model.experts import GroupedExperts
from shared.model.norm import NormBuilder, norm_of, qk_norms


class Backend(Protocol):
    """Methods return Megatron-Core's classes, or classes and builders with the same arguments.

    `layer`: index of the decoder layer from 0; MTP layers follow at num_layers, num_layers + 1..

    Attributes:
        attention_backend: of `shared.kernels.attention.choose`; None: chosen by what a layer needs.
    """

    attention_backend: AttentionBackend | None

    def config_fields(self) -> dict[str, Any]:
        """Fields of Megatron-Core's TransformerConfig that its modules read."""
        ...

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """Class of column-parallel linear layers: qkv, fc1, MLA projections, gated delta net in_proj, MTP eh_proj."""
        ...

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """Class of row-parallel linear layers: attention output, fc2, gated delta net out_proj."""
        ...

    def column_parallel_layer_norm_linear(self, norm: Norm, layer: int) -> type | None:
        """Class of a column-parallel linear layer with `norm` in front; None: norm and linear layer are two modules."""
        ...

    def norm(self, norm: Norm, *, extra_state: bool) -> NormBuilder:
        """Builder of a norm; `extra_state`: with TransformerEngine's `_extra_state` in the checkpoint."""
        ...

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        """Builders of the QK norms."""
        ...

    def core_attention(self) -> type:
        """Class of core attention: Megatron-Core's arguments, `attention` and `attention_backend`."""
        ...

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        """Builder of the routed experts from the linear layers of one expert."""
        ...

    def embedding(self) -> type:
        """Class of the factorised embedding's table (Megatron-Core's GPT builds other embeddings itself)."""
        ...

    def output_layer(self) -> type:
        """Class of an output layer with a bias or a factorised embedding (Megatron-Core's GPT builds others itself)."""
        ...


@dataclass
class LocalBackend:
    """Megatron-Core's local (non-TransformerEngine) linear layers: runs on CPU, reference on GPU."""

    attention_backend: AttentionBackend | None = None

    def config_fields(self) -> dict[str, Any]:
        return {}

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return RowParallelLinear

    def column_parallel_layer_norm_linear(self, norm: Norm, layer: int) -> type | None:
        return None

    def norm(self, norm: Norm, *, extra_state: bool) -> NormBuilder:
        return norm_of(norm, extra_state=extra_state)

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        return qk_norms(attention, norm)

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        return partial(GroupedExperts, submodules=submodules)

    def embedding(self) -> type:
        return VocabParallelEmbedding

    def output_layer(self) -> type:
        return ColumnParallelLinear


LOCAL = LocalBackend()
