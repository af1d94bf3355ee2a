"""What FP8 keeps of a linear layer: amax history, counts of an update, and the fallbacks of the guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from shared.kernels.fp8.codes import E4M3, E5M2
from shared.kernels.fp8.recipes import KINDS, Fp8Recipe, Kind
from shared.kernels.fp8.scales import History

Scaling = Literal["delayed", "current", "bf16"]

# The guard's limits, shares of a tensor's elements that are not zero, over an update. With a scale that fits nothing is
# clipped: one in a thousand is an amax that outran its history. Underflow is normal at the foot of a distribution: E4M3
# loses 1 in 100,000 normally distributed numbers.
CLIPPED_LIMIT = 1e-3
UNDERFLOW_LIMIT = 0.25

_VERSION = 1.0  # of the encoding
_SCALINGS: tuple[Scaling, ...] = ("delayed", "current", "bf16")


class TensorState:
    """Of the activations, the weights or the gradients of one linear layer."""

    def __init__(self, recipe: Fp8Recipe, kind: Kind) -> None:
        self.first: Scaling = "delayed" if recipe.name == "delayed" else "current"
        self.scaling: Scaling = self.first
        self.history = History(recipe.amax_history)
        self.dtype = E5M2 if kind == "gradients" and recipe.format == "hybrid" else E4M3
        self.amax: torch.Tensor | None = None  # fp32 `[]`, of this update so far
        self.counts: torch.Tensor | None = None  # int64 `[3]`, of `codes.count`, of this update so far

    def record(self, amax: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a micro batch. `amax`: fp32 `[]`, of this rank's part; NaN and infinity are kept as infinity."""
        amax = amax.nan_to_num(nan=torch.inf, posinf=torch.inf)
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        self.counts = counts if self.counts is None else self.counts + counts

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The amax and counts of the micro batches since the last call; None without any."""
        amax, counts, self.amax, self.counts = self.amax, self.counts, None, None
        return None if amax is None or counts is None else (amax, counts)

    def end_update(self, amax: float, clipped: int, underflow: int, nonzero: int) -> Update:
        """Append to the history, and fall back to the next scaling where the guard's limits are passed.

        Arguments: of the update, over all ranks that have this tensor or parts of it.
        """
        highest = self.history.highest
        late = self.scaling == "delayed" and highest is not None and amax > highest
        if self.scaling == "delayed":
            self.history.append(amax)
        before = self.scaling
        if clipped > CLIPPED_LIMIT * nonzero or underflow > UNDERFLOW_LIMIT * nonzero:
            self.scaling = _SCALINGS[min(_SCALINGS.index(before) + 1, 2)]
        return Update(late=late, fell_back=self.scaling if self.scaling != before else None)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update was for a tensor."""

    late: bool  # the amax was above all of the history: some elements were clipped
    fell_back: Scaling | None  # from the next update on


class LinearState:
    """Of one linear layer."""

    def __init__(self, recipe: Fp8Recipe) -> None:
        self.recipe = recipe
        self.tensors = {kind: TensorState(recipe, kind) for kind in KINDS}

    @property
    def in_bf16(self) -> bool:
        """Whether the guard took this layer out of FP8."""
        return any(each.scaling == "bf16" for each in self.tensors.values())

    def encode(self) -> torch.Tensor | None:
        """The state as numbers, fp32; None if there is nothing to resume with.

        `version, 3 scalings, 3 lengths of histories, histories`: in the order of KINDS, newest amax first.
        """
        states = [self.tensors[kind] for kind in KINDS]
        if not any(each.history.values or each.scaling != each.first for each in states):
            return None
        numbers = [_VERSION, *(float(_SCALINGS.index(each.scaling)) for each in states)]
        numbers += [float(len(each.history.values)) for each in states]
        for each in states:
            numbers += each.history.values
        return torch.tensor(numbers, dtype=torch.float32)

    def decode(self, encoded: torch.Tensor) -> None:
        """Take what `encode` gave, of any recipe: a history that this recipe does not have is left out.

        Raises:
            ValueError: it is nothing that `encode` gives.
        """
        numbers: list[float] = encoded.flatten().tolist()
        header = 1 + 2 * len(KINDS)
        counts = [int(number) for number in numbers[1 + len(KINDS) : header]]
        if numbers[:1] != [_VERSION] or len(numbers) != header + sum(counts):
            raise ValueError("this is no FP8 state of a linear layer, or of a later version")
        values = iter(numbers[header:])
        for kind, scaling, length in zip(KINDS, numbers[1:], counts, strict=False):
            history = [next(values) for _ in range(length)]
            state = self.tensors[kind]
            state.scaling = max(state.first, _SCALINGS[int(scaling)], key=_SCALINGS.index)
            if state.first == "delayed":
                state.history.restore(history)
