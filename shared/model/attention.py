"""The product of queries, keys and values, by torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.functional import scaled_dot_product_attention

from shared.architecture.architecture import Attention, LatentAttention
from shared.kernels.attention import alibi
from shared.model.rope import RotaryAngles


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


class ClippedLinear(ColumnParallelLinear):
    """Megatron-Core's projection, of which no number leaves it larger than `limit` (MPT's `clip_qkv`)."""

    def __init__(self, *args: Any, limit: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron-Core's; numbers that are cut off have no gradient."""
        projected, bias = super().forward(*args, **kwargs)
        assert bias is None  # which would be added behind the limit
        return projected.clamp(-self.limit, self.limit), None


class RotarySelfAttention(SelfAttention):
    """Megatron-Core's self attention with a factor of sines and cosines, and with angles of this layer's own.

    Megatron-Core reads that factor from its own YaRN configuration, and has the same angles in all layers.
    """

    def __init__(self, *args: Any, amplitude: float, angles: RotaryAngles | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._yarn_concentration_factor = amplitude
        self.angles = angles

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron-Core's; `rotary_pos_emb` `[sequence, 1, 1, rotated]` are the model's angles."""
        if self.angles is not None and rotary_pos_emb is not None:
            rotary_pos_emb = self.angles(len(rotary_pos_emb))
        attended: tuple[torch.Tensor, torch.Tensor | None]
        attended = super().forward(*args, rotary_pos_emb=rotary_pos_emb, **others)
        return attended


class Rotary2DSelfAttention(SelfAttention):
    """Megatron-Core's self attention with each half of a head rotated by its own positions (GLM's 2-D positions).

    Megatron-Core pairs elements half a head apart; here they are a quarter of a head apart.
    """

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron-Core's; `rotary_pos_emb` `[sequence, batch, 1, head_dim]` are the angles of both halves."""
        self.angles = rotary_pos_emb
        attended: tuple[torch.Tensor, torch.Tensor | None]
        attended = super().forward(*args, rotary_pos_emb=None, **others)
        return attended

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Queries and keys `[sequence, batch, heads, head_dim]`, rotated, and values."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self._rotated(query), self._rotated(key), value

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        halves = zip(x.chunk(2, -1), self.angles.chunk(2, -1), strict=True)
        return torch.cat([apply_rotary_pos_emb(half, angles, self.config) for half, angles in halves], -1)


class CoreAttention(torch.nn.Module):
    """Causal attention with grouped queries, as a `core_attention` of Megatron-Core's self attention.

    `attention_mask` is either None (causal) or a mask by `segment_mask` or `prefix_inputs`. It holds True where attention
    is allowed, as torch has it; Megatron-Core's own module reads masks the other way round. Window, ALiBi, soft
    cap, sinks and scale are those of `attention`.
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
        k_channels: int | None = None,  # of keys and of values, where they differ; their tensors say it too
        v_channels: int | None = None,
        attention: Attention | LatentAttention,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        assert config.context_parallel_size == 1
        # None: 1 / sqrt(head_dim). Megatron-Core's MLA gives its own.
        self.softmax_scale = attention.scale if softmax_scale is None else softmax_scale
        self.dropout = attention.dropout
        self.softcap: float | None = None
        self.window: int | None = None
        self.slopes: torch.Tensor | None = None
        self.alibi_scale: float | None = None
        self.softmax_offset: torch.nn.Parameter | None = None  # of this process's heads, under Megatron-Core's name
        if isinstance(attention, LatentAttention):
            return
        if attention.scale_by_layer:  # the layer's number in the model, whatever the pipeline's stage
            self.softmax_scale = (self.softmax_scale or attention.head_dim**-0.5) / layer_number
        self.softcap, self.window = attention.softcap, attention.window
        if attention.alibi:
            self.alibi_scale = attention.head_dim**-0.5 if attention.alibi.rounded else None
            parts = alibi.slopes(attention.heads, attention.alibi.bias_max).chunk(config.tensor_model_parallel_size)
            self.slopes = parts[parallel_state.get_tensor_model_parallel_rank()]
        if attention.sinks:
            heads = attention.heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork():
                    torch.nn.init.normal_(self.softmax_offset, std=config.init_method_std)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron-Core's modules have it."""
        own = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group()}
        if metadata and "dp_cp_group" in metadata:
            groups["dp_cp_group"] = metadata["dp_cp_group"]
        return dict(make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets, **groups))

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
        """`[sequence, batch, heads, head_dim]`, keys and values of fewer heads, to `[sequence, batch, heads * value_dim]`."""
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
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.window is not None and self.window < sequence:
            mask = _window_mask(sequence, self.window, query.device) & (True if mask is None else mask)
        if self.slopes is not None:
            mask = self._alibi_bias(sequence, query, mask)
        if self.softcap is None and self.softmax_offset is None:
            context = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        else:
            context = self._written_out(q, k, v, mask, dropout)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)

    def _alibi_bias(self, sequence: int, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert self.slopes is not None
        allowed = _window_mask(sequence, sequence, query.device) if mask is None else mask
        if self.alibi_scale is None:
            bias = alibi.bias(self.slopes.to(query.device), sequence)
        else:
            positions = allowed[:, 0].sum(-1) - 1  # of packed rows: counted from the start of each segment
            bias = alibi.rounded_bias(self.slopes.to(query.device), positions) * self.alibi_scale
        return bias.masked_fill(~allowed, -torch.inf).to(query.dtype)

    def _written_out(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        """Attention over `[batch, heads, sequence, head_dim]` with what torch's has no argument for.

        Scores `cap * tanh(score / cap)` (Gemma 2); a score more, of which no value comes (gpt-oss).
        """
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = q @ k.transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        allowed = _window_mask(q.shape[2], q.shape[2], q.device) if mask is None else mask
        scores = scores.masked_fill(~allowed, -torch.inf)
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
        return torch.nn.functional.dropout(weights, dropout) @ v


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal, the last `window` positions only, `[1, 1, length, length]` bool."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return allowed.triu_(1 - window)[None, None]
