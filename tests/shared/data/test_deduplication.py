"""Groups of documents that share keys, beside a search of the graph."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from shared.data import deduplication
from shared.data.deduplication import Groups


def _keys(parts: list[list[tuple[int, int]]]) -> Callable[[], list[tuple[np.ndarray, np.ndarray]]]:
    return lambda: [
        (np.array([a for a, _ in part], np.uint64), np.array([b for _, b in part], np.uint64)) for part in parts
    ]


@pytest.mark.parametrize("size", [1 << 22, 7])
def test_groups_are_the_connected_documents(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "RANGE", size)  # in one pass and in many
    rng = random.Random(1)
    count = 200
    bands = [[(rng.randint(0, 400), rng.randint(0, 1)) for _ in range(count)] for _ in range(3)]
    groups = Groups(count)
    for keys in bands:
        groups.join(_keys([keys[:50], [], keys[50:]]))

    first: list[int] = []
    for document in range(count):
        seen, todo = {document}, [document]
        while todo:
            one = todo.pop()
            near = [o for o in range(count) if o not in seen and any(keys[o] == keys[one] for keys in bands)]
            seen.update(near)
            todo += near
        first.append(min(seen))
    assert groups.first().tolist() == first
    assert 20 < sum(one != index for index, one in enumerate(first)) < 190


def test_both_halves_of_a_key_count() -> None:
    groups = Groups(4)
    groups.join(_keys([[(1, 1), (1, 2), (2, 1), (1, 1)]]))
    assert groups.first().tolist() == [0, 1, 2, 0]
