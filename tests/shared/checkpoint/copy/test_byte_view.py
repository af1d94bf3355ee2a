"""Concatenated and strided views: every window of rows and columns, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ByteView, ConcatenatedView, Extent, ExtentView, RowRange, StridedView
from shared.checkpoint.copy.operations import TransposedRows, stream, transpose

NUMBERS = np.arange(12 * 4, dtype=np.uint8).reshape(12, 4)


def file_view(path: Path) -> ExtentView:
    path.write_bytes(NUMBERS.tobytes())
    extent = Extent(file=path, start=0, row=0, rows=12, left=0, width=4)
    return ExtentView(name="numbers", rows=12, width=4, extents=(extent,))


def check(view: ByteView, whole: np.ndarray) -> None:
    assert (view.rows, view.width) == whole.shape
    with OpenFiles() as files:
        for row in range(view.rows):
            for rows in range(1, view.rows - row + 1):
                for left, width in ((0, 4), (1, 2), (3, 1)):
                    out = bytearray(rows * width)
                    view.read(files, row, rows, left, width, memoryview(out))
                    found = np.frombuffer(out, dtype=np.uint8).reshape(rows, width)
                    assert np.array_equal(found, whole[row : row + rows, left : left + width])


def test_strided_rows(tmp_path: Path) -> None:
    view = file_view(tmp_path / "file")
    for first, step in ((0, 2), (1, 2), (2, 3)):
        whole = NUMBERS[first::step]
        check(StridedView(view=view, first=first, rows=len(whole), step=step), whole)


def test_concatenated_rows(tmp_path: Path) -> None:
    view = file_view(tmp_path / "file")
    parts = (RowRange(view=view, row=6, rows=4, target_row=0), RowRange(view=view, row=1, rows=2, target_row=4))
    check(ConcatenatedView(name="n", rows=6, width=4, parts=parts), np.concatenate([NUMBERS[6:10], NUMBERS[1:3]]))


def test_interleaved_rows(tmp_path: Path) -> None:
    view = file_view(tmp_path / "file")
    parts = tuple(RowRange(view=view, row=4 * part, rows=4, target_row=part, step=3) for part in range(3))
    woven = NUMBERS.reshape(3, 4, 4).transpose(1, 0, 2).reshape(12, 4)
    check(ConcatenatedView(name="n", rows=12, width=4, parts=parts), woven)


def test_transpose_with_strides(tmp_path: Path) -> None:
    """Transposed in strips: strided source columns become rows, source rows become strided columns."""
    view = file_view(tmp_path / "file")
    whole = (TransposedRows(view=view, row=0, rows=12, column=0),)
    halves = tuple(TransposedRows(view=view, row=6 * part, rows=6, column=part, step=2) for part in range(2))
    with OpenFiles() as files:
        for limit in (1, 4, 1 << 20):  # strips of one column, two, and all
            taken = [b"".join(bytes(b) for b in stream(transpose(whole, p, 2, 12, 1, limit, 2), files)) for p in (0, 1)]
            assert taken == [NUMBERS[:, part::2].T.tobytes() for part in (0, 1)]
            woven = b"".join(bytes(block) for block in stream(transpose(halves, 0, 4, 12, 1, limit), files))
            assert woven == NUMBERS.reshape(2, 6, 4).transpose(2, 1, 0).tobytes()
