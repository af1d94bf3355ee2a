"""The product of queries, keys and values, by torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


def segment_mask(segments: torch.Tensor) -> torch.Tensor:
    """Which positions of packed rows see which: causal, and never across segments.

    Args:
        segments: `[batch, sequence]` integers; positions of a row with the same number belong together. Padding
            is a segment like any other (number 0), so that every position sees at least itself.

    Returns:
        `[batch, 1, sequence, sequence]` bool, True where the query (third axis) may attend to the key (fourth).
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril_()


class CoreAttention(torch.nn.Module):
    """Causal attention with grouped queries, as a `core_attention` of Megatron-Core's self attention.

    `attention_mask` is either None (causal) or a mask by `segment_mask`. It holds True where attention is allowed,
    as torch has it; Megatron-Core's own module reads masks the other way round.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert config.context_parallel_size == 1
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """`[sequence, batch, heads, head_dim]`, keys and values of fewer heads, to `[sequence, batch, heads * head_dim]`."""
        assert attention_bias is None
        assert packed_seq_params is None
        if self.training and self.dropout > 0.0:
            # Each tensor-parallel process holds other heads and must drop other weights.
            with get_cuda_rng_tracker().fork():
                return self._attend(query, key, value, attention_mask, self.dropout)
        return self._attend(query, key, value, attention_mask, 0.0)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        sequence, batch = query.shape[:2]
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
