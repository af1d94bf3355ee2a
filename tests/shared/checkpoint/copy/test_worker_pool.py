"""Bytes and hashes do not depend on the number of threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.operations import Block, FilePlan, WriteBytes, pack_blocks
from shared.checkpoint.copy.worker_pool import write_files
from shared.checkpoint.files import hash_file

CONTENT = {f"f{n}": np.random.default_rng(n).bytes(n * 1000 + 7) for n in range(5)}


def new_file(name: str, content: bytes, step: int = 64) -> FilePlan:
    pieces = [WriteBytes(content[start : start + step]) for start in range(0, len(content), step)]
    return FilePlan(name=name, size=len(content), sources=frozenset(), make_blocks=lambda: pack_blocks(pieces, step))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_bytes_and_hashes(tmp_path: Path, workers: int) -> None:
    told: list[int] = []
    hashes = write_files(tmp_path, [new_file(*item) for item in CONTENT.items()], workers=workers, advance=told.append)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENT
    assert hashes == {name: hash_file(tmp_path / name) for name in CONTENT}
    assert sum(told) == sum(map(len, CONTENT.values()))


def test_blocks_of_one_file_are_filled_concurrently_and_finalized_in_order(tmp_path: Path) -> None:
    together, seen, order = threading.Barrier(3, timeout=10), [], itertools.count()

    def blocks() -> Iterator[Block]:
        for number in range(9):

            def fill(files: OpenFiles, out: memoryview, number: int = number) -> None:
                together.wait()  # passes only when three threads are in it
                time.sleep((3 - number % 3) / 100)  # the last of them first
                out[:] = bytes([number])

            def finalize(out: memoryview) -> None:
                seen.append(out[0])
                out[:] = bytes([10 * out[0] + next(order)])

            yield Block(size=1, fill=fill, finalize=finalize, resumable=False)

    file = FilePlan(name="f", size=9, sources=frozenset(), make_blocks=blocks)
    write_files(tmp_path, [file], workers=3)
    assert seen == list(range(9))
    assert (tmp_path / "f").read_bytes() == bytes(11 * number for number in range(9))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_failure_stops_all_and_is_raised(tmp_path: Path, workers: int) -> None:
    made: list[int] = []

    def blocks() -> Iterator[Block]:
        for number in range(10_000):

            def fill(files: OpenFiles, out: memoryview, number: int = number) -> None:
                made.append(number)
                if number == 20:
                    raise ZeroDivisionError

            yield Block(size=1, fill=fill)

    file = FilePlan(name="f", size=10_000, sources=frozenset(), make_blocks=blocks)
    with pytest.raises(ZeroDivisionError):
        write_files(tmp_path, [file, new_file("g", bytes(100_000))], workers=workers)
    assert len(made) < 100


def test_tasks_are_done_by_the_time_it_returns(tmp_path: Path) -> None:
    done: list[int] = []
    tasks = [lambda number=number: done.append(number) for number in range(5)]
    write_files(tmp_path, [], workers=2, tasks=tasks)
    assert sorted(done) == list(range(5))

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_files(tmp_path, [new_file("f", b"x")], workers=2, tasks=[fails])


def test_a_file_of_another_size_than_planned_is_a_defect(tmp_path: Path) -> None:
    file = FilePlan(name="f", size=3, sources=frozenset(), make_blocks=lambda: pack_blocks([WriteBytes(b"xx")]))
    with pytest.raises(AssertionError, match="2 bytes instead of 3"):
        write_files(tmp_path, [file], workers=1)


def test_an_empty_file(tmp_path: Path) -> None:
    hashes = write_files(tmp_path, [new_file("f", b"")], workers=2)
    assert hashes == {"f": hash_file(tmp_path / "f")}
