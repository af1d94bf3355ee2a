"""Matrices that are put together of others, and taken apart: every window of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.checkpoint.copy.blocks import Files
from shared.checkpoint.copy.byte_view import Box, EveryNth, Gathered, Matrix, Region, Rows
from shared.checkpoint.copy.operations import Part, stream, turned

NUMBERS = np.arange(12 * 4, dtype=np.uint8).reshape(12, 4)


def region(path: Path) -> Region:
    path.write_bytes(NUMBERS.tobytes())
    box = Box(file=path, start=0, row=0, rows=12, left=0, width=4)
    return Region(name="numbers", rows=12, width=4, boxes=(box,))


def check(matrix: Matrix, whole: np.ndarray) -> None:
    assert (matrix.rows, matrix.width) == whole.shape
    with Files() as files:
        for row in range(matrix.rows):
            for rows in range(1, matrix.rows - row + 1):
                for left, width in ((0, 4), (1, 2), (3, 1)):
                    out = bytearray(rows * width)
                    matrix.read(files, row, rows, left, width, memoryview(out))
                    found = np.frombuffer(out, dtype=np.uint8).reshape(rows, width)
                    assert np.array_equal(found, whole[row : row + rows, left : left + width])


def test_rows_that_are_apart(tmp_path: Path) -> None:
    matrix = region(tmp_path / "file")
    for first, step in ((0, 2), (1, 2), (2, 3)):
        whole = NUMBERS[first::step]
        check(EveryNth(matrix=matrix, first=first, rows=len(whole), step=step), whole)


def test_rows_of_several_places(tmp_path: Path) -> None:
    matrix = region(tmp_path / "file")
    parts = (Rows(matrix=matrix, row=6, rows=4, at=0), Rows(matrix=matrix, row=1, rows=2, at=4))
    check(Gathered(name="n", rows=6, width=4, parts=parts), np.concatenate([NUMBERS[6:10], NUMBERS[1:3]]))


def test_rows_in_turn(tmp_path: Path) -> None:
    matrix = region(tmp_path / "file")
    parts = tuple(Rows(matrix=matrix, row=4 * part, rows=4, at=part, step=3) for part in range(3))
    woven = NUMBERS.reshape(3, 4, 4).transpose(1, 0, 2).reshape(12, 4)
    check(Gathered(name="n", rows=12, width=4, parts=parts), woven)


def test_columns_in_turn(tmp_path: Path) -> None:
    """Transposed, strip by strip: columns that are apart become rows, and rows columns that are apart."""
    matrix = region(tmp_path / "file")
    whole = (Part(region=matrix, row=0, rows=12, at=0),)
    halves = tuple(Part(region=matrix, row=6 * part, rows=6, at=part, step=2) for part in range(2))
    with Files() as files:
        for limit in (1, 4, 1 << 20):  # strips of one column, two, and all
            taken = [b"".join(bytes(b) for b in stream(turned(whole, p, 2, 12, 1, limit, 2), files)) for p in (0, 1)]
            assert taken == [NUMBERS[:, part::2].T.tobytes() for part in (0, 1)]
            woven = b"".join(bytes(block) for block in stream(turned(halves, 0, 4, 12, 1, limit), files))
            assert woven == NUMBERS.reshape(2, 6, 4).transpose(2, 1, 0).tobytes()
