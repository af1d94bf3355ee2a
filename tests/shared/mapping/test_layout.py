"""Layouts cover their target and every source exactly once, and are invertible."""

from __future__ import annotations

import numpy as np
import pytest

from shared.mapping.layout import (
    CONCAT,
    PADDING,
    Deinterleave,
    Interleave,
    InterleaveFused,
    InterleaveGatedQKV,
    LayoutError,
    PadRows,
    RowLayout,
    SplitInterleaved,
    SwapHalves,
    Transposed,
    segments_of_source,
    segments_of_target,
)

CASES: list[tuple[RowLayout, list[tuple[int, ...]]]] = [
    (CONCAT, [(5, 3)]),
    (CONCAT, [(4, 3), (4, 3)]),
    (CONCAT, [(7,)]),
    (Interleave(groups=2), [(8, 3), (4, 3), (4, 3)]),
    (Interleave(groups=1), [(8, 3), (2, 3), (2, 3)]),
    (Interleave(groups=4), [(4,), (4,), (4,)]),
    (InterleaveFused(parts=(8, 4, 4), groups=2), [(16, 3)]),
    (InterleaveFused(parts=(4, 1, 1), groups=1), [(6,)]),
    (InterleaveGatedQKV(groups=2, head_dim=2), [(16, 3), (4, 3), (4, 3)]),
    (InterleaveGatedQKV(groups=1, head_dim=1), [(6,), (1,), (1,)]),
    (Deinterleave(parts=2), [(8, 3)]),
    (Deinterleave(parts=3), [(9,)]),
    (SwapHalves(), [(6, 3)]),
    (SwapHalves(), [(4,)]),
    (PadRows(rows=8), [(5, 3)]),
    (PadRows(rows=8), [(8, 3)]),
]


def numbered(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Sources whose every number is another one."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = np.cumsum([1, *sizes])
    return [np.arange(a, a + n).reshape(s) for a, n, s in zip(starts, sizes, shapes, strict=False)]


def apply(layout: RowLayout, sources: list[np.ndarray]) -> np.ndarray:
    shapes = [source.shape for source in sources]
    target = np.full(layout.target_shape(shapes), -1)
    for segment in layout.segments(shapes):
        rows = slice(segment.target_row, segment.target_row + segment.rows)
        assert (target[rows] == -1).all(), "written twice"
        if segment.source == PADDING:
            target[rows] = 0
        else:
            target[rows] = sources[segment.source][segment.source_row :: segment.step][: segment.rows]
    assert (target != -1).all(), "not written"
    return target


@pytest.mark.parametrize(("layout", "shapes"), CASES)
def test_backwards_gives_every_source_back(layout: RowLayout, shapes: list[tuple[int, ...]]) -> None:
    sources = numbered(shapes)
    target = apply(layout, sources)
    segments = layout.segments(shapes)
    for place, source in enumerate(sources):
        found = np.zeros_like(source)
        for s in segments_of_source(segments, place):
            found[s.source_row :: s.step][: s.rows] = target[s.target_row : s.target_row + s.rows]
        assert np.array_equal(found, source)


@pytest.mark.parametrize(("layout", "shapes"), CASES)
def test_any_window_of_the_target_is_made_of_cut_segments(layout: RowLayout, shapes: list[tuple[int, ...]]) -> None:
    sources = numbered(shapes)
    target = apply(layout, sources)
    segments = layout.segments(shapes)
    for first in range(len(target)):
        for rows in range(1, len(target) - first + 1):
            parts = [
                np.zeros((s.rows, *target.shape[1:]))
                if s.source == PADDING
                else sources[s.source][s.source_row :: s.step][: s.rows]
                for s in segments_of_target(segments, first, rows)
            ]
            assert np.array_equal(np.concatenate(parts), target[first : first + rows])


def test_interleaving_is_megatron_s_qkv() -> None:
    """Two groups of two query heads, head_dim 1: [q1 q2 k1 v1 | q3 q4 k2 v2]."""
    q, k, v = np.array([1, 2, 3, 4]), np.array([10, 20]), np.array([100, 200])
    assert apply(Interleave(groups=2), [q, k, v]).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_interleaving_agrees_with_the_reshape_of_megatron_bridge() -> None:
    """The other formulation: view as [groups, heads, head_dim, hidden], concatenate over heads."""
    groups, per_group, dim, hidden = 3, 4, 2, 5
    q, k, v = numbered([(groups * per_group * dim, hidden), (groups * dim, hidden), (groups * dim, hidden)])
    parts = [part.reshape(groups, -1, dim, hidden) for part in (q, k, v)]
    expected = np.concatenate(parts, axis=1).reshape(-1, hidden)
    assert np.array_equal(apply(Interleave(groups=groups), [q, k, v]), expected)


@pytest.mark.parametrize(
    ("layout", "shapes", "message"),
    [
        (Interleave(groups=3), [(6, 2), (4, 2)], "4 rows are not 3 equal groups"),
        (CONCAT, [(4, 2), (4, 3)], "different widths"),
        (SwapHalves(), [(5, 3)], "5 rows are not two halves"),
        (PadRows(rows=4), [(5, 2)], "5 rows do not fit in 4"),
        (
            InterleaveGatedQKV(groups=2, head_dim=2),
            [(12, 3), (4, 3), (4, 3)],
            "12 rows are not 2 groups of queries and gates",
        ),
        (SplitInterleaved(parts=(2, 2), groups=2, part=0), [(6,)], r"6 rows are not 2 groups of \[2, 2\] rows in all"),
    ],
)
def test_shapes_that_do_not_fit(layout: RowLayout, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout.segments(shapes)


def test_gates_of_a_group_follow_its_queries() -> None:
    """One group of two heads, head_dim 1: [q1 g1 ; q2 g2], k, v to [q1 q2 g1 g2 k v], as Megatron-Core splits it."""
    queries, k, v = np.array([1, 51, 2, 52, 3, 53, 4, 54]), np.array([10, 20]), np.array([100, 200])
    layout = InterleaveGatedQKV(groups=2, head_dim=1)
    assert apply(layout, [queries, k, v]).tolist() == [1, 2, 51, 52, 10, 100, 3, 4, 53, 54, 20, 200]


def test_parts_of_what_was_dealt_are_what_it_was_made_of() -> None:
    sources = numbered([(4, 3), (4, 3), (8, 3), (2, 3)])
    dealt = apply(Interleave(groups=2), sources)
    sizes = tuple(len(source) for source in sources)
    for place, source in enumerate(sources):
        assert np.array_equal(apply(SplitInterleaved(parts=sizes, groups=2, part=place), [dealt]), source)


def test_halves_change_places() -> None:
    assert apply(SwapHalves(), [np.arange(6)]).tolist() == [3, 4, 5, 0, 1, 2]


def test_a_fused_projection_is_dealt_as_three_are() -> None:
    q, k, v = (np.arange(rows)[:, None] + start for rows, start in ((8, 0), (2, 100), (2, 200)))
    apart = apply(Interleave(groups=2), [q, k, v])
    assert np.array_equal(apply(InterleaveFused(parts=(8, 2, 2), groups=2), [np.concatenate([q, k, v])]), apart)
    with pytest.raises(LayoutError, match="12 rows are not blocks of"):
        InterleaveFused(parts=(8, 2, 1), groups=1).target_shape([(12, 3)])


def test_transposed_sources_are_dealt_by_columns() -> None:
    inner = InterleaveFused(parts=(8, 2, 2), groups=2)
    layout = Transposed(layout=inner)
    assert layout.target_shape([(3, 12)]) == inner.target_shape([(12, 3)]) == (12, 3)
    assert layout.segments([(3, 12)]) == inner.segments([(12, 3)])


def test_rows_in_turn_follow_each_other() -> None:
    (source,) = numbered([(6, 2)])
    assert np.array_equal(apply(Deinterleave(parts=2), [source]), np.concatenate([source[::2], source[1::2]]))
    segments = Deinterleave(parts=2).segments([(6, 2)])
    assert [(s.source_row, s.target_row, s.rows, s.step) for s in segments_of_target(segments, 1, 4)] == [
        (2, 1, 2, 2),
        (1, 3, 2, 2),
    ]
    with pytest.raises(LayoutError, match="8 rows do not deinterleave into 3 equal parts"):
        Deinterleave(parts=3).target_shape([(8, 2)])
