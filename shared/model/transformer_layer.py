"""Transformer layers with any residual kind and norm placement."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from shared.architecture.architecture import Layer
from shared.model.norm import NormBuilder


class GeneralTransformerLayer(TransformerLayer):
    """TransformerLayer with any residual kind and norm placement.

    `i` is `input_multiplier`, `m` is `multiplier`; `norm` and `post` are identities if the placement has no such norm.

    - sequential: `h = i x + m post(attention(norm(x)))`, then `i h + m post(mlp(norm(h)))`
    - sequential, norm placement sum: `h = post(i x + m attention(x))`, then `post(i h + m mlp(h))`
    - normed: sequential with `i norm(x)` and `i norm(h)`
    - parallel: `x + m (attention(norm(x)) + mlp(norm'(x)))`; parallel_shared: `norm' = norm`
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        layer: Layer,
        post_norm: NormBuilder | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.residual_kind = layer.residual.kind
        self.norm_of_sum = layer.norm_placement == "sum"
        self.multiplier, self.input_multiplier = layer.residual.multiplier, layer.residual.input_multiplier
        self.post_self_attn_layernorm: torch.nn.Module = torch.nn.Identity()
        self.post_mlp_layernorm: torch.nn.Module = torch.nn.Identity()
        if post_norm is not None:
            sizes = {"config": config, "hidden_size": config.hidden_size}
            self.post_self_attn_layernorm, self.post_mlp_layernorm = post_norm(**sizes), post_norm(**sizes)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """`[sequence, batch, hidden]`, shape unchanged.

        `padding_mask`: for MoE, `[batch, sequence]` of this rank. `others` (inference, cross attention) must be None.
        """
        assert all(value is None for value in others.values()), others
        attended = self.input_layernorm(hidden_states)
        attention = self.self_attention(attended, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        normed = self.residual_kind == "normed"
        if normed or self.residual_kind == "sequential":
            added_to = attended if normed else hidden_states
            hidden_states = self._add(attention, added_to, self.post_self_attn_layernorm)
            read = self.pre_mlp_layernorm(hidden_states)
            computed, added_to = self.mlp(read, padding_mask=padding_mask), read if normed else hidden_states
            return self._add(computed, added_to, self.post_mlp_layernorm), None
        read = attended if self.residual_kind == "parallel_shared" else self.pre_mlp_layernorm(hidden_states)
        added = self._dropped(self.mlp(read, padding_mask=padding_mask)) + self._dropped(attention)
        return hidden_states + self.multiplier * added, None

    def _add(
        self, output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, norm: torch.nn.Module
    ) -> torch.Tensor:
        if self.norm_of_sum:
            return norm(self.input_multiplier * residual + self.multiplier * self._dropped(output))
        return self.input_multiplier * residual + self.multiplier * norm(self._dropped(output))

    def _dropped(self, output: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """`dropout(output + bias)` of a row-parallel layer."""
        states, bias = output
        states = states if bias is None else states + bias
        return torch.nn.functional.dropout(states, self.hidden_dropout, self.training)
