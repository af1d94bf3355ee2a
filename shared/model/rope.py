"""RoPE: inverse frequencies and angles.

Shapes: S sequence, B batch, R rotary_dim, P position streams (2 for 2-D positions, else 1).
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from shared.architecture.architecture import RopeScaling, Rotary
from shared.kernels.rotary import cos_sin


class RotaryAngles(RotaryEmbedding):
    """Megatron-Core's RotaryEmbedding with the inverse frequencies of a `Rotary`: angles `[S, 1, 1, R]` in radians."""

    inv_freq: torch.Tensor

    def __init__(self, rotary: Rotary, dim: int, max_position_embeddings: int) -> None:
        """`dim`: rotary_dim."""
        super().__init__(dim, 1.0, rotary_interleaved=rotary.interleaved, use_cpu_initialization=True)
        self.rotary, self.rotary_dim, self.max_position_embeddings = rotary, dim, max_position_embeddings
        self._tables: tuple[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] | None = None

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles `[S, R / 2]` of positions from `offset` on, one per pair."""
        frequencies = inverse_frequencies(
            self.rotary,
            self.rotary_dim,
            length=offset + max_seq_len,
            max_position_embeddings=self.max_position_embeddings,
        )
        # Not a buffer: stays fp32 when the model is cast, and is not in the checkpoint.
        self.inv_freq = frequencies.to(self.inv_freq.device)
        angles: torch.Tensor = super().get_freqs_non_repeated(max_seq_len, offset)
        return angles

    def tables(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[S, 1, 1, R]` of a sequence of `length` tokens, with the concentration factor, in `dtype`.

        With context parallelism of this rank's part. The last tables are kept: all layers that share this module, their
        recomputation and the next micro batches have the same.
        """
        key = length, dtype
        if self._tables is None or self._tables[0] != key:
            self._tables = key, cos_sin(self(length), concentration_factor(self.rotary), dtype)
        return self._tables[1]


class PrefixRotaryAngles(torch.nn.Module):
    """RoPE angles of a prefix LM from position ids, in place of Megatron-Core's M-RoPE.

    Each position stream rotates R / P elements of a head, with the same frequencies.
    """

    def __init__(self, rotary: Rotary, dim: int) -> None:
        """`dim`: R / P."""
        super().__init__()
        self.frequencies = inverse_frequencies(rotary, dim)

    def forward(self, position_ids: torch.Tensor, section: object, cp_group: object = None) -> torch.Tensor:
        """Positions `[P, B, S]` -> angles `[S, B, 1, R]` in radians."""
        angles = position_ids.float()[..., None] * self.frequencies.to(position_ids.device)
        return torch.cat([torch.cat((part, part), -1) for part in angles], -1).transpose(0, 1)[:, :, None]


def inverse_frequencies(
    rotary: Rotary, dim: int, *, length: int = 1, max_position_embeddings: int | None = None
) -> torch.Tensor:
    """inv_freq in radians per token, `[dim / 2]`, fp32 on the CPU.

    `theta^(-2i / dim)` (Su et al., 2021), scaled by `rotary.scaling`. Megatron-Core's own LLaMA 3.1 scaling has fixed
    frequency factors and original length.

    Args:
        rotary: theta and scaling.
        dim: rotary_dim.
        length: sequence length in tokens, for longrope and dynamic scaling.
        max_position_embeddings: of the model, for dynamic scaling.
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


def concentration_factor(rotary: Rotary | None) -> float:
    """Multiplier of cos and sin."""
    return rotary.scaling.concentration_factor if rotary and rotary.scaling else 1.0


def _dynamic(factor: float, dim: int, stretch: float) -> float:
    """Dynamic NTK: multiplier of theta for sequence length = stretch * max_position_embeddings (transformers, InternLM)."""
    excess = max(stretch, 1.0) - 1.0
    return (1.0 + factor * excess) ** (dim / (dim - 2))


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """LLaMA 3.1: formula and order of operations of transformers' `_compute_llama3_parameters`."""
    low, high, length = scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_length
    wavelengths = 2 * math.pi / frequencies
    smooth = (length / wavelengths - low) / (high - low)
    interpolated = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    is_long, is_short = wavelengths > length / low, wavelengths < length / high
    stretched = torch.where(is_long, frequencies / scaling.factor, interpolated)
    return torch.where(is_short, frequencies, stretched)


def _yarn(frequencies: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """YaRN (Peng et al., 2023): order of operations of transformers' `_compute_yarn_parameters`."""
    pairs = len(frequencies)

    def pair_of(rotations: float) -> float:
        """Index of the pair with this many rotations in original_length."""
        return pairs * math.log(scaling.original_length / (rotations * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # avoid division by zero
    ramp = ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * (1.0 / frequencies)) * (1 - kept) + frequencies * kept
