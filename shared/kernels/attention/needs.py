"""What a call of attention needs, and what a back end carries.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head_dim, V value head_dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch

HALF = (torch.bfloat16, torch.float16)  # the dtypes of flash kernels

Feature = Literal[
    "packed rows",
    "prefix LM",
    "window",
    "ALiBi",
    "rounded ALiBi",
    "soft cap",
    "sinks",
    "dropout",
    "grouped queries",
    "value width",
    "later queries",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the attention of a layer computes beside `softmax(scale q k^T) v`.

    Attributes:
        scale: softmax scale; None: `1 / sqrt(D)`.
        window: keys that a query attends to, its own included; None: all before it.
        softcap: `cap` in `cap tanh(scale q k^T / cap)` (Gemma 2); None: no soft cap.
        sinks_H: attention sinks, one extra logit per head without a value (gpt-oss).
        slopes_H: ALiBi slopes, fp32.
        rounded_alibi: factor of Falcon RW's bias (`alibi.rounded_bias`); None: the bias of the paper.
        dropout: attention dropout probability.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None
    slopes_H: torch.Tensor | None = None
    rounded_alibi: float | None = None
    dropout: float = 0.0

    def scale_of(self, head_dim: int) -> float:
        """The softmax scale as a number."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a call needs. Queries are the last of the keys' positions."""

    device: str  # "cpu" or "cuda"
    capability: tuple[int, int] | None  # of the GPU; None on CPU
    dtype: torch.dtype
    query_length: int
    key_length: int
    heads: int
    groups: int
    head_dim: int  # of queries and keys
    value_dim: int
    packed: bool = False  # several segments in a row
    prefix: bool = False  # prefix LM: a segment's prefix is attended to by all of it
    window: bool = False
    alibi: bool = False
    rounded_alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features by name."""
        found: dict[Feature, bool] = {
            "packed rows": self.packed,
            "prefix LM": self.prefix,
            "window": self.window,
            "ALiBi": self.alibi and not self.rounded_alibi,
            "rounded ALiBi": self.rounded_alibi,
            "soft cap": self.softcap,
            "sinks": self.sinks,
            "dropout": self.dropout,
            "grouped queries": self.groups != self.heads,
            "value width": self.value_dim != self.head_dim,
            "later queries": self.query_length != self.key_length,
        }
        return tuple(name for name, needed in found.items() if needed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments of an attention call.

    Attributes:
        q_BHQD, k_BGKD, v_BGKV: G divides H; H / G consecutive query heads share a key/value head.
        segments: of whole rows, `[B, S]` or `[B, 2, S]` (`masks`); None: one segment per row. Keys are the first K of a row,
            queries the last Q of these: parts of a row in context parallelism.
        features: what the layer computes beside.
    """

    q_BHQD: torch.Tensor
    k_BGKD: torch.Tensor
    v_BGKV: torch.Tensor
    segments: torch.Tensor | None
    features: Features

    @property
    def query_start(self) -> int:
        """Position of the first query in its row."""
        return self.k_BGKD.shape[2] - self.q_BHQD.shape[2]

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.features.scale_of(self.q_BHQD.shape[-1])

    @property
    def needs(self) -> Needs:
        """What a back end must carry."""
        features, segments, key_length = self.features, self.segments, self.k_BGKD.shape[2]
        return Needs(
            device=self.q_BHQD.device.type,
            capability=capability_of(self.q_BHQD.device),
            dtype=self.q_BHQD.dtype,
            query_length=self.q_BHQD.shape[2],
            key_length=key_length,
            heads=self.q_BHQD.shape[1],
            groups=self.k_BGKD.shape[1],
            head_dim=self.q_BHQD.shape[3],
            value_dim=self.v_BGKV.shape[3],
            packed=segments is not None and segments.ndim == 2,
            prefix=segments is not None and segments.ndim == 3,
            window=features.window is not None and features.window < key_length,
            alibi=features.slopes_H is not None,
            rounded_alibi=features.rounded_alibi is not None,
            softcap=features.softcap is not None,
            sinks=features.sinks_H is not None,
            dropout=features.dropout > 0.0,
        )


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None on CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True)
class Carries:
    """One row of the capability table: what a back end carries. Features that are not in `lacks` are carried.

    Attributes:
        lacks: features it does not carry, each with the reason.
        devices: torch's device types.
        dtypes: None: every dtype.
        capability: least CUDA compute capability.
        below: first CUDA compute capability it was not made for.
        head_dim: largest head_dim of queries, keys and values.
    """

    lacks: Mapping[Feature, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] | None = None
    capability: tuple[int, int] = (0, 0)
    below: tuple[int, int] | None = None
    head_dim: int | None = None

    def reasons(self, needs: Needs) -> list[str]:
        """Why it does not carry the call; empty if it does."""
        if needs.device not in self.devices:
            return [f"{' and '.join(self.devices).upper()} only"]
        found = []
        if needs.capability is not None and needs.capability < self.capability:
            found.append(f"compute capability {_dotted(needs.capability)} is below {_dotted(self.capability)}")
        if needs.capability is not None and self.below is not None and needs.capability >= self.below:
            found.append(f"not for compute capability {_dotted(needs.capability)}")
        if self.dtypes is not None and needs.dtype not in self.dtypes:
            found.append(" and ".join(_name(dtype) for dtype in self.dtypes) + f" only, not {_name(needs.dtype)}")
        largest = max(needs.head_dim, needs.value_dim)
        if self.head_dim is not None and largest > self.head_dim:
            found.append(f"head_dim {largest} is above {self.head_dim}")
        return found + [f"{name}: {self.lacks[name]}" for name in needs.features if name in self.lacks]


FLASH = Carries(devices=("cuda",), dtypes=HALF, capability=(8, 0), head_dim=256)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def cannot_import(module: str) -> str | None:
    """Why a module of an optional package cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or for another CUDA
        return f"{module} does not import: {str(error).splitlines()[0]}"
    return None
