"""A blend of sources: which source each sample of the run comes from. Pure arithmetic of whole numbers, without torch.

The stream is divided source by source. Of p samples, floor(p * w1 / (w1 + ... + wn)) are of source 1; the others are divided
among sources 2 to n in the same way. So every stretch of the stream has the shares to within a few samples; the place of a
sample follows from its number, without a table; and each source is read in its own order, whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sources with their shares of the samples; also one source alone."""

    names: tuple[str, ...]
    weights: tuple[int, ...]  # relative
    sequences: tuple[int, ...]  # samples in an epoch of each source

    @classmethod
    def of(cls, names: Sequence[str], sequences: Sequence[int], weights: Sequence[float] | None = None) -> Blend:
        """`weights` are read as the decimal numbers they are written as; None: every source is read equally often."""
        if weights is None:
            whole = tuple(sequences)
        else:
            exact = [Fraction(repr(float(weight))) for weight in weights]
            common = lcm(*(fraction.denominator for fraction in exact))
            whole = tuple(int(fraction * common) for fraction in exact)
        return cls(names=tuple(names), weights=whole, sequences=tuple(sequences))

    def locate(self, position: int) -> tuple[int, int]:
        """The source of a sample, and the position in the stream of that source."""
        left = sum(self.weights)
        for source, weight in enumerate(self.weights):
            before = position * weight // left
            if (position + 1) * weight // left > before:
                return source, before
            position, left = position - before, left - weight
        raise AssertionError("the last source has what is left")

    def counts(self, samples: int) -> tuple[int, ...]:
        """How many of the first samples come from each source."""
        left, found = sum(self.weights), []
        for weight in self.weights:
            found.append(samples * weight // left)
            samples, left = samples - found[-1], left - weight
        return tuple(found)

    @property
    def epoch(self) -> int:
        """Samples until the first source is used up: none is read twice. Of sources read equally often, all samples."""
        total = sum(self.weights)
        samples = min(n * total // weight for n, weight in zip(self.sequences, self.weights, strict=True))
        while any(count > n for count, n in zip(self.counts(samples), self.sequences, strict=True)):
            samples -= 1  # rounding gives a source a few samples more than its share
        return samples

    def facts(self, samples: int) -> list[dict[str, Any]]:
        """For each source: name, share of the samples, samples in an epoch, and epochs read after `samples` of the run."""
        total = sum(self.weights)
        return [
            {"name": name, "share": weight / total, "sequences": sequences, "epochs": round(count / sequences, 4)}
            for name, weight, sequences, count in zip(
                self.names, self.weights, self.sequences, self.counts(samples), strict=True
            )
        ]
