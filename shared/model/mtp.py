"""MTP layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


class MTPLayer(MultiTokenPredictionLayer):
    """Megatron-Core's MTP layer with the padding of the decoder.

    Megatron-Core shifts the padding mask with the tokens, within each rank's part of the sequence. The mask says which
    positions count for the balance of experts; an MTP layer computes the same positions.
    """

    def _get_embeddings(
        self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Any, torch.Tensor | None, Any, Any]:
        input_ids, position_ids, _, decoder_input, hidden_states = super()._get_embeddings(*args, **kwargs)
        return input_ids, position_ids, padding_mask, decoder_input, hidden_states
