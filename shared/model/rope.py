"""Rotary frequencies and angles.

Shapes: S sequence, B batch, R rotated elements of a head, P streams of positions.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from shared.architecture.architecture import RopeScaling, Rotary


class RotaryAngles(RotaryEmbedding):
    """Megatron-Core's angles `[S, 1, 1, R]` in radians, at the frequencies of a `Rotary`."""

    inv_freq: torch.Tensor

    def __init__(self, rotary: Rotary, dim: int, max_position_embeddings: int) -> None:
        """`dim`: rotated elements of a head."""
        super().__init__(dim, 1.0, rotary_interleaved=rotary.interleaved, use_cpu_initialization=True)
        self.rotary, self.rotary_dim, self.max_position_embeddings = rotary, dim, max_position_embeddings

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles of every pair, `[S, R / 2]`, of the positions from `offset` on."""
        frequencies = inverse_frequencies(
            self.rotary,
            self.rotary_dim,
            length=offset + max_seq_len,
            max_position_embeddings=self.max_position_embeddings,
        )
        # A plain attribute, not a buffer: it stays fp32 when the model is cast, and out of checkpoints.
        self.inv_freq = frequencies.to(self.inv_freq.device)
        angles: torch.Tensor = super().get_freqs_non_repeated(max_seq_len, offset)
        return angles


class PrefixRotaryAngles(torch.nn.Module):
    """Angles of a prefix LM's positions, in place of Megatron-Core's M-RoPE.

    Each stream of positions rotates an equal part of the head, all by the same frequencies.
    """

    def __init__(self, rotary: Rotary, dim: int) -> None:
        """`dim`: rotated elements of a head by each stream."""
        super().__init__()
        self.frequencies = inverse_frequencies(rotary, dim)

    def forward(self, position_ids: torch.Tensor, section: object, cp_group: object = None) -> torch.Tensor:
        """Positions `[P, B, S]` to angles `[S, B, 1, R]` in radians."""
        angles = position_ids.float()[..., None] * self.frequencies.to(position_ids.device)
        return torch.cat([torch.cat((part, part), -1) for part in angles], -1).transpose(0, 1)[:, :, None]


def inverse_frequencies(
    rotary: Rotary, dim: int, *, length: int = 1, max_position_embeddings: int | None = None
) -> torch.Tensor:
    """Radians per token of every rotated pair, `[dim / 2]`, fp32 on the CPU.

    `theta^(-2i / dim)` (Su et al., 2021), scaled by `rotary.scaling`. Megatron-Core has the LLaMA 3.1 scaling too, but
    with fixed factors and original length.

    Args:
        rotary: theta and scaling.
        dim: rotated elements of a head.
        length: the sequence's, in tokens; longrope and dynamic scaling depend on it.
        max_position_embeddings: the model's; dynamic scaling needs it.
    """
    theta, scaling = rotary.theta, rotary.scaling
    if scaling is not None and scaling.kind == "dynamic":
        assert max_position_embeddings is not None
        theta *= _dynamic(scaling.factor, dim, length / max_position_embeddings)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is not None and scaling.kind == "longrope":
        factors = scaling.long_factors if length > scaling.original_length else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)
    frequencies = 1.0 / powers
    if rotary.fp16_frequencies:
        frequencies = frequencies.half().float()
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    return _llama3(frequencies, scaling)


def amplitude(rotary: Rotary | None) -> float:
    """Factor of sines and cosines."""
    return rotary.scaling.amplitude if rotary and rotary.scaling else 1.0


def _dynamic(factor: float, dim: int, stretch: float) -> float:
    """Factor of theta for a sequence `stretch` times as long as `max_position_embeddings` (transformers, InternLM)."""
    excess = max(stretch, 1.0) - 1.0
    return (1.0 + factor * excess) ** (dim / (dim - 2))


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """LLaMA 3.1: long wavelengths are divided by `factor`, short ones kept, the rest interpolated.

    Formula and order of operations of `_compute_llama3_parameters` in transformers' modeling_rope_utils.
    """
    low, high, length = scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_length
    wavelengths = 2 * math.pi / frequencies
    smooth = (length / wavelengths - low) / (high - low)
    interpolated = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    is_long, is_short = wavelengths > length / low, wavelengths < length / high
    stretched = torch.where(is_long, frequencies / scaling.factor, interpolated)
    return torch.where(is_short, frequencies, stretched)


def _yarn(frequencies: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """YaRN (Peng et al., 2023): fast pairs are kept, slow ones divided by `factor`, those between mixed linearly.

    Order of operations of `_compute_yarn_parameters` in transformers' modeling_rope_utils.
    """
    pairs = len(frequencies)

    def pair_of(turns: float) -> float:
        """Which pair turns so often in the original length."""
        return pairs * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # no division by zero
    ramp = ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * (1.0 / frequencies)) * (1 - kept) + frequencies * kept
