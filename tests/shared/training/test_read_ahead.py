"""Batches that a thread reads ahead are those that would be read without it."""

import threading
from dataclasses import fields

import numpy as np
import pytest
import torch

from shared.training.data import Batch
from shared.training.read_ahead import ReadAhead, pinned


class Data:
    """Rows that say their position; records who read what."""

    sequence_length = 4

    def __init__(self) -> None:
        self.read: list[tuple[int, ...]] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 100

    def batch(self, positions) -> Batch:
        if positions[0] >= 90:
            raise OSError("the disk is gone")
        self.read.append(tuple(positions.tolist()))
        self.threads.add(threading.current_thread().name)
        rows = torch.from_numpy(positions)[:, None].expand(-1, 4).clone()
        return Batch(tokens=rows, labels=rows + 1)


@pytest.fixture
def data():
    return Data()


@pytest.fixture
def ahead(data):
    reader = ReadAhead(data, ahead=4, pin=False)
    yield reader
    reader.close()


def update(first: int) -> list[np.ndarray]:
    """Positions of the two micro batches of an update of four samples."""
    return [np.array([first, first + 1]), np.array([first + 2, first + 3])]


def test_each_batch_is_that_of_its_positions_and_is_read_once_before_it_is_wanted(data, ahead):
    for first in (0, 4, 8):
        for positions in update(first):
            batch = ahead.batch(positions)
            assert batch.tokens[:, 0].tolist() == positions.tolist()
            assert batch.labels[:, 0].tolist() == (positions + 1).tolist()
    ahead.close()
    wanted = [tuple(positions.tolist()) for first in (0, 4, 8, 12) for positions in update(first)]
    assert sorted(data.read) == wanted[: len(data.read)]
    assert len(data.read) >= 6  # the update after the last is read if there is time
    assert all(name.startswith("read-ahead") for name in data.threads)


def test_a_resume_or_another_place_is_read_as_asked(data, ahead):
    for first in (0, 40, 4):
        assert ahead.batch(update(first)[0]).tokens[:, 0].tolist() == [first, first + 1]


def test_an_error_is_raised_where_the_batch_is_wanted(ahead):
    assert ahead.batch(np.array([87, 88])).tokens[0, 0] == 87  # and 91 is read ahead
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.batch(np.array([91, 92]))


def test_the_thread_reads_while_the_caller_computes(data, ahead):
    ahead.batch(np.array([0, 1]))
    for _ in range(1000):
        if len(data.read) == 2:
            break
        threading.Event().wait(0.01)
    assert data.read == [(0, 1), (4, 5)]


def test_every_part_of_a_batch_is_pinned(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: seen.append(part) or part)
    ones = torch.ones(1, 4, dtype=torch.int64)
    batch = pinned(Batch(tokens=ones, labels=ones + 1, segments=ones + 2))
    assert [part.min().item() for part in seen] == [1, 2, 3]
    assert batch.segments is seen[2]
    assert pinned(Batch(tokens=ones, labels=ones)).segments is None
    assert {"tokens", "labels", "segments"} <= {field.name for field in fields(batch)}
