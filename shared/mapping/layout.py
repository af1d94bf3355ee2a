"""Layouts: invertible maps from the rows of one Megatron tensor to the rows of its source tensors.

Shapes: `[out, in]` has `out` rows of `in` elements, `[out]` has `out` rows of one. `;` joins blocks of rows, `|` joins
groups, q/k/v/g are the rows of one query/key/value/gate head. A layout compiles to segments (row ranges), so a
conversion copies byte ranges and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Shape = tuple[int, ...]
PADDING = -1  # source index of rows of zeros
ONES = -2  # source index of rows of ones


class LayoutError(ValueError):
    """Source shapes do not fit the layout; the caller adds the tensor name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """`rows` rows, contiguous in the target, `step` apart in the source."""

    source: int  # index into the rule's sources, or PADDING or ONES
    source_row: int
    target_row: int
    rows: int
    step: int = 1


class RowLayout(Protocol):
    """A permutation of whole rows. Segments tile the target in order and use no source row twice."""

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the Megatron tensor, from the shapes of its sources."""
        ...

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        """Segments in the order of target rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Interleave:
    """Merge several sources group by group: each source is `groups` equal blocks of rows.

    QKV, one group per key/value head: `[q1..qn] [k1 k2] [v1 v2]` to `[q1..qn/2 k1 v1 | q.. k2 v2]`.
    `groups=1` concatenates: `[gate] [up]` to `[gate ; up]`. One source with `groups=1` is a copy.
    """

    groups: int = 1

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        columns = {shape[1:] for shape in shapes}
        if len(columns) != 1:
            raise LayoutError(f"rows of different widths cannot be concatenated: {[list(s) for s in shapes]}")
        for shape in shapes:
            if shape[0] % self.groups:
                raise LayoutError(f"{shape[0]} rows are not {self.groups} equal groups")
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        self.target_shape(shapes)
        result, target = [], 0
        for group in range(self.groups):
            for source, shape in enumerate(shapes):
                rows = shape[0] // self.groups
                result.append(Segment(source=source, source_row=group * rows, target_row=target, rows=rows))
                target += rows
        return tuple(result)


@dataclass(frozen=True, kw_only=True)
class InterleaveFused:
    """`Interleave` of one fused source: `[q ; k ; v]`, blocks of `parts` rows, to `[q1..qn k1 v1 | q.. k2 v2 | ...]`."""

    parts: tuple[int, ...]
    groups: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] != sum(self.parts):
            raise LayoutError(f"{shape[0]} rows are not blocks of {list(self.parts)} rows")
        return Interleave(groups=self.groups).target_shape([(part, *shape[1:]) for part in self.parts])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        self.target_shape(shapes)
        starts = [sum(self.parts[:index]) for index in range(len(self.parts))]
        return tuple(
            Segment(source=0, source_row=starts[s.source] + s.source_row, target_row=s.target_row, rows=s.rows)
            for s in Interleave(groups=self.groups).segments([(part,) for part in self.parts])
        )


@dataclass(frozen=True, kw_only=True)
class InterleaveGatedQKV:
    """QKV of gated attention: `[q1 g1 ; q2 g2 ; ..] [k1 k2] [v1 v2]` to `[q1..qn g1..gn k1 v1 | q.. g.. k2 v2 | ...]`.

    One group per key/value head, as in Megatron-Core.
    """

    groups: int
    head_dim: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        queries, *_ = shapes
        if queries[0] % (2 * self.head_dim * self.groups):
            raise LayoutError(f"{queries[0]} rows are not {self.groups} groups of queries and gates")
        return Interleave(groups=self.groups).target_shape(shapes)

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        self.target_shape(shapes)
        result: list[Segment] = []
        for block in Interleave(groups=self.groups).segments(shapes):
            if block.source:
                result.append(block)
                continue
            pairs = block.rows // (2 * self.head_dim)
            for index in range(2 * pairs):  # all queries of the group, then all gates
                source = 2 * (index % pairs) + index // pairs
                result.append(
                    Segment(
                        source=0,
                        source_row=block.source_row + source * self.head_dim,
                        target_row=block.target_row + index * self.head_dim,
                        rows=self.head_dim,
                    )
                )
        return tuple(result)


@dataclass(frozen=True, kw_only=True)
class SplitInterleaved:
    """One part of an interleaved source: `[q1 k1 v1 | q2 k2 v2 | ...]` to `[q1 ; q2 ..]`.

    `parts` are total rows per part, `part` indexes them. Other rules take the other parts.
    """

    parts: tuple[int, ...]
    groups: int
    part: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] != sum(self.parts) or any(part % self.groups for part in self.parts):
            raise LayoutError(f"{shape[0]} rows are not {self.groups} groups of {list(self.parts)} rows in all")
        return (self.parts[self.part], *shape[1:])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        self.target_shape(shapes)
        interleaved = Interleave(groups=self.groups).segments([(part,) for part in self.parts])
        return tuple(
            Segment(source=0, source_row=s.target_row, target_row=s.source_row, rows=s.rows)
            for s in interleaved
            if s.source == self.part
        )


@dataclass(frozen=True, kw_only=True)
class Deinterleave:
    """Row-interleaved source to concatenated parts: `[gate1 up1 gate2 up2 ..]` to `[gate ; up]` with `parts=2`."""

    parts: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] % self.parts:
            raise LayoutError(f"{shape[0]} rows do not deinterleave into {self.parts} equal parts")
        return shape

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        rows = self.target_shape(shapes)[0] // self.parts
        return tuple(
            Segment(source=0, source_row=part, target_row=part * rows, rows=rows, step=self.parts)
            for part in range(self.parts)
        )


@dataclass(frozen=True, kw_only=True)
class SwapHalves:
    """Swap the two halves of one source: `[up ; gate]` to `[gate ; up]`."""

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] % 2:
            raise LayoutError(f"{shape[0]} rows are not two halves")
        return shape

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        half = self.target_shape(shapes)[0] // 2
        return tuple(Segment(source=0, source_row=half - row, target_row=row, rows=half) for row in (0, half))


@dataclass(frozen=True, kw_only=True)
class PadRows:
    """Zero-pad one source to `rows` rows (vocabulary padding)."""

    rows: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] > self.rows:
            raise LayoutError(f"{shape[0]} rows do not fit in {self.rows}")
        return (self.rows, *shape[1:])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        (shape,) = shapes
        padding = self.target_shape(shapes)[0] - shape[0]
        result = [Segment(source=0, source_row=0, target_row=0, rows=shape[0])]
        if padding:
            result.append(Segment(source=PADDING, source_row=0, target_row=shape[0], rows=padding))
        return tuple(result)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A target tensor without a source, filled with zeros or ones."""

    shape: Shape
    value: Literal[0, 1] = 0

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        source = ONES if self.value else PADDING
        return (Segment(source=source, source_row=0, target_row=0, rows=self.shape[0]),)


@dataclass(frozen=True, kw_only=True)
class Transposed:
    """`layout` applied to transposed sources, `[in, out]`: segments count source columns."""

    layout: RowLayout

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.layout.target_shape([shape[::-1] for shape in shapes])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        return self.layout.segments([shape[::-1] for shape in shapes])


COPY = Interleave(groups=1)
CONCAT = Interleave(groups=1)


def segments_of_source(segments: Sequence[Segment], source: int) -> list[Segment]:
    """The inverse layout: segments of one source, in the order of its rows."""
    return sorted((s for s in segments if s.source == source), key=lambda s: s.source_row)


def segments_of_target(segments: Sequence[Segment], first: int, rows: int) -> list[Segment]:
    """Segments of target rows `first` to `first + rows`, clipped."""
    result = []
    for segment in segments:
        start = max(segment.target_row, first)
        stop = min(segment.target_row + segment.rows, first + rows)
        if start < stop:
            row = segment.source_row + (start - segment.target_row) * segment.step
            result.append(replace(segment, source_row=row, target_row=start, rows=stop - start))
    return result
