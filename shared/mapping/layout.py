"""Layouts: how rows of source tensors make up the rows of one Megatron tensor, in a form that runs both ways.

A *row* is one index of a tensor's first dimension: `[out, in]` has `out` rows of `in` elements, `[out]` has `out` rows
of one. A layout that only moves rows compiles to segments, so that a conversion copies byte ranges and needs neither
the tensors' arithmetic nor a tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Shape = tuple[int, ...]
PADDING = -1  # the source of rows of zeros
ONES = -2  # and of rows of ones


class LayoutError(ValueError):
    """Shapes that a layout cannot take; the caller knows the tensor's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """`rows` rows that are contiguous in the target, and `step` apart in the source."""

    source: int  # which of the rule's sources, or PADDING or ONES
    source_row: int
    target_row: int
    rows: int
    step: int = 1


class RowLayout(Protocol):
    """A layout that moves whole rows. Its segments tile the target in order, and use no source's row twice."""

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the Megatron tensor made of sources of these shapes."""
        ...

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        """The target's rows in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Interleave:
    """Sources cut into `groups` equal runs of rows, dealt out group by group.

    `groups=1` concatenates (`[gate ; up]`), and of one source copies. Attention's QKV has one group for every
    key/value head: `[q1..qn k1 v1 | q.. k2 v2 | ...]`.
    """

    groups: int = 1

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        columns = {shape[1:] for shape in shapes}
        if len(columns) != 1:
            raise LayoutError(f"rows of different widths cannot be joined: {[list(s) for s in shapes]}")
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
class Deal:
    """One source made of blocks of `parts` rows, dealt out as `Interleave` deals several sources.

    A fused QKV `[q ; k ; v]` becomes `[q1..qn k1 v1 | q.. k2 v2 | ...]` with one group for every key/value head.
    """

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
class Gated:
    """Attention whose query heads each have a gate, `[q1 g1 ; q2 g2 ; ..]`, and keys and values beside them.

    One group for every key/value head, as Megatron-Core has it: `[q1..qn g1..gn k1 v1 | q.. g.. k2 v2 | ...]`.
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
        for whole in Interleave(groups=self.groups).segments(shapes):
            if whole.source:
                result.append(whole)
                continue
            pairs = whole.rows // (2 * self.head_dim)
            for index in range(2 * pairs):  # all queries of the group, then all gates
                source = 2 * (index % pairs) + index // pairs
                result.append(
                    Segment(
                        source=0,
                        source_row=whole.source_row + source * self.head_dim,
                        target_row=whole.target_row + index * self.head_dim,
                        rows=self.head_dim,
                    )
                )
        return tuple(result)


@dataclass(frozen=True, kw_only=True)
class Undealt:
    """One part of a source that `Interleave` would make of several: `[q1 k1 v1 | q2 k2 v2 | ...]` gives `[q1 ; q2 ..]`.

    `parts` are rows of each of them in all; the other parts are other rules' to take.
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
        dealt = Interleave(groups=self.groups).segments([(part,) for part in self.parts])
        return tuple(
            Segment(source=0, source_row=s.target_row, target_row=s.source_row, rows=s.rows)
            for s in dealt
            if s.source == self.part
        )


@dataclass(frozen=True, kw_only=True)
class Unwoven:
    """One source whose rows belong to `parts` tensors in turn, which follow each other: `[g1 u1 g2 u2 ..]` to `[g ; u]`."""

    parts: int

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] % self.parts:
            raise LayoutError(f"{shape[0]} rows are not those of {self.parts} tensors in turn")
        return shape

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        rows = self.target_shape(shapes)[0] // self.parts
        return tuple(
            Segment(source=0, source_row=part, target_row=part * rows, rows=rows, step=self.parts)
            for part in range(self.parts)
        )


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """One source whose two halves change places: `[up ; gate]` becomes `[gate ; up]`."""

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
    """One source followed by rows of zeros up to `rows`: a vocabulary padded so that it divides over ranks."""

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
    """No source: a tensor that the target has to have, and whose numbers are all the same."""

    shape: Shape
    value: Literal[0, 1] = 0

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        source = ONES if self.value else PADDING
        return (Segment(source=source, source_row=0, target_row=0, rows=self.shape[0]),)


@dataclass(frozen=True, kw_only=True)
class Transposed:
    """A layout of sources that are matrices the other way round, `[in, out]`: rows are their columns.

    Its segments count columns of the sources; whoever moves them holds one tensor at a time.
    """

    rows: RowLayout

    def target_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.rows.target_shape([shape[::-1] for shape in shapes])

    def segments(self, shapes: Sequence[Shape]) -> tuple[Segment, ...]:
        return self.rows.segments([shape[::-1] for shape in shapes])


COPY = Interleave(groups=1)
CONCAT = Interleave(groups=1)


def of_source(segments: Sequence[Segment], source: int) -> list[Segment]:
    """The layout backwards: one source's rows in order."""
    return sorted((s for s in segments if s.source == source), key=lambda s: s.source_row)


def of_target(segments: Sequence[Segment], first: int, rows: int) -> list[Segment]:
    """The segments that make up `rows` rows of the target from row `first` on, cut to fit."""
    result = []
    for segment in segments:
        start = max(segment.target_row, first)
        stop = min(segment.target_row + segment.rows, first + rows)
        if start < stop:
            row = segment.source_row + (start - segment.target_row) * segment.step
            result.append(replace(segment, source_row=row, target_row=start, rows=stop - start))
    return result
