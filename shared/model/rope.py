"""Rotary frequencies and angles of an architecture."""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from shared.architecture.architecture import Architecture, RopeScaling


class Rotation(RotaryEmbedding):
    """Megatron-Core's angles `[sequence, 1, 1, rotated]` in radians, at the architecture's frequencies.

    `windowed` are those of layers with a sliding window, where they have others.
    """

    inv_freq: torch.Tensor

    def __init__(self, architecture: Architecture, *, windowed: bool = False) -> None:
        interleaved = architecture.rotary_interleaved
        super().__init__(architecture.rotated, 1.0, rotary_interleaved=interleaved, use_cpu_initialization=True)
        self.architecture, self.windowed = architecture, windowed

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles of every pair, `[positions, rotated / 2]`, of the positions from `offset` on."""
        frequencies = inverse_frequencies(self.architecture, offset + max_seq_len, windowed=self.windowed)
        # A plain attribute, not a buffer: it stays fp32 when the model is cast, and out of checkpoints.
        self.inv_freq = frequencies.to(self.inv_freq.device)
        angles: torch.Tensor = super().get_freqs_non_repeated(max_seq_len, offset)
        return angles


class PlacedRotation(torch.nn.Module):
    """Angles of given positions, in place of Megatron-Core's rotation by several streams of them (M-RoPE).

    Each stream rotates an equal part of the head, by frequencies of its own that are the same for all.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, position_ids: torch.Tensor, section: object, cp_group: object = None) -> torch.Tensor:
        """Positions `[streams, batch, sequence]` to angles `[sequence, batch, 1, rotated]` in radians."""
        frequencies = inverse_frequencies(self.architecture).to(position_ids.device)
        angles = position_ids.float()[..., None] * frequencies
        return torch.cat([torch.cat((part, part), -1) for part in angles], -1).transpose(0, 1)[:, :, None]


def inverse_frequencies(architecture: Architecture, length: int = 1, *, windowed: bool = False) -> torch.Tensor:
    """Radians per token of every rotated pair, `[rotated / 2]`, fp32 on the CPU; of each stream where there are several.

    `theta^(-2i / rotated)` (Su et al., 2021), where `rotated` is head_dim or the part of it that is rotated, stretched
    as the architecture's `rope_scaling` says. `length` is the sequence's, in tokens: longrope and dynamic depend on it.
    `windowed` asks for those of layers with a sliding window. Megatron-Core has the LLaMA 3.1 stretch too, but with its
    factors and original length fixed.
    """
    theta, scaling = architecture.rope_theta, architecture.rope_scaling
    if windowed and architecture.window_rope_theta is not None:
        theta, scaling = architecture.window_rope_theta, None
    if scaling is not None and scaling.kind == "dynamic":
        theta *= _dynamic(architecture, scaling.factor, length)
    rotated = architecture.rotated // architecture.position_streams
    powers = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    if scaling is not None and scaling.kind == "longrope":
        factors = scaling.long_factors if length > scaling.original_length else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)
    frequencies = 1.0 / powers
    if architecture.rotary_fp16:
        frequencies = frequencies.half().float()
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(frequencies, theta, scaling)
    return _llama3(frequencies, scaling)


def _dynamic(architecture: Architecture, factor: float, length: int) -> float:
    """What theta is multiplied with, 1 up to the longest sequence that the model is for (transformers, InternLM)."""
    excess = max(length / architecture.max_position_embeddings, 1.0) - 1.0
    return (1.0 + factor * excess) ** (architecture.rotated / (architecture.rotated - 2))


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
