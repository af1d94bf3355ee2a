"""Self attention: Megatron-Core's module with per-layer RoPE, and core attention from `shared.kernels.attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from shared.architecture.architecture import Attention, LatentAttention
from shared.kernels.attention import alibi
from shared.kernels.attention.choose import attend
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.attention.needs import Call, Features
from shared.kernels.rotary import cos_sin, rotate
from shared.model.context_parallel import exchange_of
from shared.model.rope import RotaryAngles


def clipped(linear: Callable[..., Any], limit: float) -> Callable[..., Any]:
    """`linear` with its output clamped to `[-limit, limit]` (MPT's `clip_qkv`); clamped elements have zero gradient."""

    def clamp(
        module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, None]:
        projected, bias = output
        assert bias is None  # Megatron-Core would add it after the clamp
        return projected.clamp(-limit, limit), None

    def build(*args: Any, **kwargs: Any) -> Any:
        built = linear(*args, **kwargs)
        built.register_forward_hook(clamp)
        return built

    return build


class RotarySelfAttention(SelfAttention):
    """Megatron-Core's self attention with the RoPE of `angles`: layers with the same RoPE share one, and its cos and sin.

    Megatron-Core computes one set of angles for all layers, cos and sin in each layer for queries and for keys, and has a
    concentration factor in its YaRN only.
    """

    def __init__(self, *args: Any, angles: RotaryAngles, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.angles = angles

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron-Core's; `rotary_pos_emb` `[sequence, 1, 1, rotary_dim]`, of the model, says the length."""
        # With context parallelism this rank's part, while RotaryAngles takes the length of the whole sequence.
        self.length = len(rotary_pos_emb) * self.config.context_parallel_size
        attended: tuple[torch.Tensor, torch.Tensor | None]
        attended = super().forward(*args, rotary_pos_emb=None, **others)
        return attended

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """q and k after RoPE, v, and the gate if there is one, `[sequence, batch, heads, head_dim]` each."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        cos, sin = self.angles.tables(self.length, query.dtype)
        query, key = (rotate(x, cos, sin, interleaved=self.config.rotary_interleaved) for x in (query, key))
        return query, key, *others


class Rotary2DSelfAttention(SelfAttention):
    """Megatron-Core's self attention with 2-D RoPE (GLM): half of each head by position, half by block position.

    Within each half, pairs are head_dim / 4 apart; Megatron-Core's own are head_dim / 2 apart.
    """

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron-Core's; `rotary_pos_emb` `[sequence, batch, 1, head_dim]`: angles of both halves."""
        self.angles = rotary_pos_emb
        attended: tuple[torch.Tensor, torch.Tensor | None]
        attended = super().forward(*args, rotary_pos_emb=None, **others)
        return attended

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """q and k after RoPE, and v, `[sequence, batch, heads, head_dim]` each."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        tables = [cos_sin(angles, 1.0, query.dtype) for angles in self.angles.chunk(2, -1)]
        query, key = (
            torch.cat(
                [rotate(half, *table, interleaved=False) for half, table in zip(x.chunk(2, -1), tables, strict=True)],
                -1,
            )
            for x in (query, key)
        )
        return query, key, value


class CoreAttention(torch.nn.Module):
    """Causal GQA, as `core_attention` of Megatron-Core's self attention.

    The `attention_mask` argument carries `segments` (`shared.kernels.attention.masks`), or None for causal attention.
    Sliding window, ALiBi, soft cap, sinks and softmax scale come from `attention`; `attention_backend` is `choose`'s name.
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
        k_channels: int | None = None,  # MLA's head_dim of k and v; unused, forward reads it from the tensors
        v_channels: int | None = None,
        attention: Attention | LatentAttention,
        attention_backend: AttentionBackend | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        self.exchange = exchange_of(config)
        # None: 1 / sqrt(head_dim). Megatron-Core's MLA passes softmax_scale.
        self.softmax_scale = attention.scale if softmax_scale is None else softmax_scale
        self.dropout, self.attention_backend = attention.dropout, attention_backend
        self.softcap: float | None = None
        self.window: int | None = None
        self.slopes: torch.Tensor | None = None
        self.alibi_scale: float | None = None
        self.softmax_offset: torch.nn.Parameter | None = None  # sinks of this rank's heads, Megatron-Core's name
        if isinstance(attention, LatentAttention):
            return
        if attention.scale_by_layer:  # layer_number counts from 1 over all pipeline stages
            self.softmax_scale = (self.softmax_scale or attention.head_dim**-0.5) / layer_number
        self.softcap, self.window = attention.softcap, attention.window
        if attention.alibi:
            self.alibi_scale = attention.head_dim**-0.5 if attention.alibi.rounded else None
            parts = alibi.slopes(attention.heads, attention.alibi.bias_max).chunk(config.tensor_model_parallel_size)
            self.slopes = self.exchange.heads(parts[parallel_state.get_tensor_model_parallel_rank()])
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
        """As in Megatron-Core's modules; sinks are sharded over tensor-parallel ranks."""
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
        segments: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """q `[sequence, batch, heads, head_dim]`, k and v with `groups` heads -> `[sequence, batch, heads * value_dim]`.

        With context parallelism, q, k, v and the result are those of this rank's part of the sequence.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        if self.training and self.dropout > 0.0:
            # Tensor-parallel ranks hold different heads, so they need different dropout masks.
            with get_cuda_rng_tracker().fork():
                return self.exchange(partial(self._attend, dropout=self.dropout), query, key, value, segments)
        return self.exchange(self._attend, query, key, value, segments)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: torch.Tensor | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Keys and values are the first of a row, queries the last of these positions."""
        q_BHSD, k_BGSD, v_BGSV = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        features = Features(
            scale=self.softmax_scale,
            window=self.window,
            softcap=self.softcap,
            sinks_H=self.exchange.heads(self.softmax_offset) if self.softmax_offset is not None else None,
            slopes_H=self.slopes,
            rounded_alibi=self.alibi_scale,
            dropout=dropout,
        )
        call = Call(q_BHQD=q_BHSD, k_BGKD=k_BGSD, v_BGKV=v_BGSV, segments=segments, features=features)
        attended_BHSV = attend(call, self.attention_backend)
        return attended_BHSV.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
