"""Order of samples: pure functions of seed, step and layout. A resume needs only the step.

The samples of a global batch depend neither on data-parallel size nor on micro batch size. Only their assignment to ranks
does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

type Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=4)  # the epochs at both ends of a batch, for training and for validation
def permutation(seed: int, epoch: int, length: int, stream: int = 0) -> Indices:
    """The order of `length` items in an epoch. Each `stream` is an independent order.

    Philox is a counter-based generator: its stream depends on the key alone, on every platform.
    """
    key = np.random.SeedSequence([seed, epoch, stream])
    order = np.random.Generator(np.random.Philox(key)).permutation(length)
    order.setflags(write=False)  # cached, and shared by every caller
    return order


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
