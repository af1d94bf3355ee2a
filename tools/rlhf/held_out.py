"""Rows held out of training, to measure what was learned on rows that were not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shared.errors import UserError
from tools.rlhf.options import PreferenceOptions


@dataclass(frozen=True, kw_only=True)
class HeldOut[T]:
    """The rows of `--data`: rows = train + held out + dropped."""

    train: list[T]
    validation: list[T]
    dropped: Mapping[str, int]
    """Rows that are not used, by reason."""

    @property
    def dropped_rows(self) -> int:
        """Rows that are not used."""
        return sum(self.dropped.values())


def whole_micro_batches[T](split: HeldOut[T], micro_batch_size: int, world_size: int) -> HeldOut[T]:
    """Rows that make whole micro-batches of every process; accelerate fills a part of one up with rows of the first.

    Held-out rows are cut alike, unless there are fewer than one micro-batch of every process.
    """
    size = micro_batch_size * world_size
    train = split.train[: len(split.train) - len(split.train) % size]
    validation = split.validation[: len(split.validation) - len(split.validation) % size] or split.validation
    left = len(split.train) + len(split.validation) - len(train) - len(validation)
    return HeldOut(train=train, validation=validation, dropped={**split.dropped, "an incomplete micro-batch": left})


def hold_out[T](rows: Sequence[T], options: PreferenceOptions, *, dropped: Mapping[str, int], what: str) -> HeldOut[T]:
    """Shuffle by the seed and hold out the first rows.

    Args:
        rows: in the order of `--data`.
        options: fraction, seed and the rows that an update takes.
        dropped: rows left out by the reader, by reason.
        what: the rows' name in errors.

    Raises:
        UserError: too few training rows remain.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    held_out = math.ceil(options.validation_fraction * len(rows))
    split = HeldOut(
        train=[rows[i] for i in order[held_out:]], validation=[rows[i] for i in order[:held_out]], dropped=dropped
    )
    if len(split.train) < options.global_batch_size:
        gone = "".join(f", {count} dropped as {reason}" for reason, count in dropped.items())
        raise UserError(
            f"--data {options.data} leaves {len(split.train)} {what} to train on ({held_out} held out{gone}), fewer than "
            f"--global-batch-size {options.global_batch_size}; lower it"
        )
    return split
