"""Order of samples: pure functions of seed, step and layout. A resume needs only the step.

The samples of a global batch depend neither on data-parallel size nor on micro batch size. Only their assignment to ranks
does.

Two shuffles give two orders. `permutation` is a table, 8 bytes per item. `scattered` is computed item by item and has no
table: for data whose table would not fit beside the model of every rank (`default_order`). A run records which it began
with and keeps it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

type Indices = npt.NDArray[np.int64]
type Order = Literal["permutation", "scattered"]

TABLE_ITEMS = 1 << 22  # documents or samples: the tables of a dataset then have 96 MiB
_ROUNDS = 6


def default_order(items: int) -> Order:
    """The order of a new run whose largest source has so many documents or samples."""
    return "permutation" if items <= TABLE_ITEMS else "scattered"


def permutation(seed: int, epoch: int, length: int, stream: int = 0) -> Indices:
    """The order of `length` items in an epoch. Each `stream` is an independent order.

    Philox is a counter-based generator: its stream depends on the key alone, on every platform.
    """
    key = np.random.SeedSequence([seed, epoch, stream])
    return np.random.Generator(np.random.Philox(key)).permutation(length)


def scattered(seed: int, epoch: int, length: int, stream: int, items: Indices) -> Indices:
    """`order[items]` of a pseudo-random order of `length` items, computed without a table.

    A Feistel network (Luby and Rackoff, 1988) is a permutation of the numbers of some bits, here of two parts that differ
    by a bit at most. A number beyond `length` is sent through again until it is below (cycle walking, Black and Rogaway,
    2002): fewer than two passes on average. Constants of splitmix64.
    """
    bits = max((length - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    keys = np.random.SeedSequence([seed, epoch, stream]).generate_state(_ROUNDS, np.uint64)
    found = np.array(items, dtype=np.uint64)
    beyond = np.ones(found.shape, dtype=bool)
    while beyond.any():
        value = found[beyond]
        low, high = value & low_mask, value >> low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mixed(low + first) & high_mask
            low ^= _mixed(high + second) & low_mask
        found[beyond] = high << low_bits | low
        beyond[beyond] = found[beyond] >= np.uint64(length)
    return found.astype(np.int64)


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = value ^ value >> np.uint64(31)
    return mixed


class Shuffle:
    """The items of every epoch in one of the two orders; `seed` None: as they are. Keeps the table of one epoch."""

    def __init__(self, order: Order, seed: int | None, length: int, stream: int) -> None:
        self._order, self._seed, self._length, self._stream = order, seed, length, stream
        self._epoch, self._table = -1, np.zeros(0, np.int64)

    def __call__(self, epoch: int, place: int) -> int:
        """The item at a place of an epoch."""
        if self._seed is None:
            return place
        if self._order == "scattered":
            return int(scattered(self._seed, epoch, self._length, self._stream, np.array([place]))[0])
        if epoch != self._epoch:
            self._epoch, self._table = epoch, permutation(self._seed, epoch, self._length, self._stream)
        return int(self._table[place])


def batch_positions(*, first: int, micro_batch: int, micro_batch_size: int, rank: int, ranks: int) -> Indices:
    """Positions `[micro_batch_size]` in the endless stream of samples, for data-parallel `rank` of `ranks`.

    Args:
        first: the update's first sample.
        micro_batch: index of the micro batch within the update.
        micro_batch_size: samples per forward pass of one rank.
        rank: this data-parallel rank.
        ranks: number of data-parallel ranks.
    """
    start = first + (micro_batch * ranks + rank) * micro_batch_size
    return np.arange(start, start + micro_batch_size, dtype=np.int64)
