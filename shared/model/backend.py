"""Which implementations a model is built of: the one place that names linear layers, norms and attention products.

Megatron-Core's own seam is `BackendSpecProvider` (megatron/core/models/backends.py). This one has its methods under the
same names, with what ours decide by: linear layers are asked for per layer, and those of experts apart from dense ones, so
that a precision or an adapter is a choice of some layers; norms are asked for by their value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from shared.architecture.architecture import Attention, Norm
from shared.model.attention import CoreAttention
from shared.model.norm import NormBuilder, norm_of, qk_norms


class Backend(Protocol):
    """Classes are Megatron-Core's or take the same arguments; builders are called with the same arguments.

    `layer` counts decoder layers from 0, MTP layers behind the last of them.
    """

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """Linear layers cut along their rows: q, k, v; fc1; MLA's projections; a gated delta net's input; MTP's."""
        ...

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        """Linear layers cut along their columns: the attention output, fc2, a gated delta net's output."""
        ...

    def norm(self, norm: Norm, *, checkpointed: bool) -> NormBuilder:
        """A norm; `checkpointed`: an entry of its own in a checkpoint, not part of the linear layer behind it."""
        ...

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        """Norms of queries and of keys."""
        ...

    def core_attention(self) -> type:
        """The attention product; takes Megatron-Core's arguments and `attention`, the layer's value."""
        ...

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        """Builder of the routed experts, of which each has these linear layers."""
        ...

    def embedding(self) -> type:
        """Table of the embedding, where Megatron-Core's GPT does not build it: factorised."""
        ...

    def output_layer(self) -> type:
        """Output layer, where Megatron-Core's GPT does not build it: factorised, or with a bias."""
        ...


class LocalBackend:
    """Megatron-Core's own linear layers with torch's arithmetic: CPU, and the reference elsewhere."""

    def column_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self, layer: int, *, expert: bool = False) -> type:
        return RowParallelLinear

    def norm(self, norm: Norm, *, checkpointed: bool) -> NormBuilder:
        return norm_of(norm, checkpointed=checkpointed)

    def qk_norms(self, attention: Attention, norm: Norm) -> tuple[NormBuilder | None, NormBuilder | None]:
        return qk_norms(attention, norm)

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, submodules: MLPSubmodules) -> Callable[..., Any]:
        return partial(SequentialMLP, submodules=submodules)

    def embedding(self) -> type:
        return VocabParallelEmbedding

    def output_layer(self) -> type:
        return ColumnParallelLinear


LOCAL = LocalBackend()
