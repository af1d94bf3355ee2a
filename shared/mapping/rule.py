"""Rules: one line of a family's tensor table, and what a table says of one particular model.

A rule is `Megatron key | axes | source names | layout`. Names may hold `{layer}`, `{expert}`, `{query_head}` and
`{key_head}`; a rule over the axis `layer` makes one entry for every layer, stacked by Megatron-Core into one tensor
`[layers, ...]`, and over `layer` and `expert` one for every expert, `[layers, experts, ...]`; over heads likewise. Where
layers differ, Megatron-Core does not stack them: the key itself holds `{layer}` then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Literal

from shared.errors import UserError
from shared.mapping.layout import COPY, PADDING, LayoutError, PadRows, RowLayout, Segment, Shape, Transposed

Axis = Literal["layer", "expert", "query_head", "key_head"]
# What names begin with, and what some files have in its place.
Spellings = Mapping[str, tuple[str, ...]]


def spelt(name: str, spellings: Spellings) -> list[str]:
    """A name as files may have it: as it is given, then with every form of what it begins with."""
    names = [name]
    for prefix, others in spellings.items():
        forms = (prefix, *others)
        names += [other + name.removeprefix(form) for form in forms if name.startswith(form) for other in forms]
    return names


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor of the Hugging Face form, of which a rule may take some rows and other rules the rest."""

    name: str
    shape: Shape  # of what the rule takes: without the axes of `within`
    within: tuple[Axis, ...] = ()  # axes that are dimensions of the tensor, its first: it holds all experts' in one
    stack: Shape = ()  # of an entry: their sizes,
    index: Shape = ()  # and the place on them
    fp32: bool = False  # whatever the type of the model's other weights
    # What a new model's are: normal with the family's deviation (biases zero, norms one), normal be it a bias, all one,
    # or logarithms of numbers spread evenly up to 16.
    drawn: Literal["usual", "normal", "one", "log"] = "usual"

    @property
    def stored_shape(self) -> Shape:
        """Shape of the tensor that it is in."""
        return (*self.stack, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one Megatron tensor is made of source tensors, and they of it."""

    megatron: str
    sources: tuple[Source, ...]
    layout: RowLayout = COPY
    axes: tuple[Axis, ...] = ()
    layers: tuple[int, ...] | None = None  # those that have it; None: all
    less_one: bool = False  # Megatron-Core holds the numbers less one, and adds it when it computes

    @property
    def stacked(self) -> tuple[Axis, ...]:
        """The axes that are dimensions of the Megatron tensor."""
        return tuple(axis for axis in self.axes if f"{{{axis}}}" not in self.megatron)


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A source tensor that some checkpoints store though it is another one: a tied output head."""

    name: str
    of: str
    copy: bool = False  # whatever the configuration says of tied embeddings


@dataclass(frozen=True, kw_only=True)
class Aside:
    """A source tensor that no Megatron tensor is made of: kept beside the weights and restored."""

    name: str
    axes: tuple[Axis, ...] = ("layer",)
    layers: tuple[int, ...] | None = None
    complete: bool = False  # a checkpoint has all of those that say so, or none
    shape: Shape | None = None  # of those that every checkpoint has: they are a part of the model, not constants


@dataclass(frozen=True, kw_only=True)
class Table:
    """All tensors of one model."""

    rules: tuple[Rule, ...]
    aliases: tuple[Alias, ...] = ()
    asides: tuple[Aside, ...] = ()
    spellings: Spellings = field(default_factory=dict)
    sizes: Mapping[Axis, int]  # how many of each axis

    def named_as(self, found: Collection[str]) -> Table:
        """The same table, its names beginning as the names found do: for each prefix the first form that one of them has."""
        given: dict[str, str] = {}
        for prefix, others in self.spellings.items():
            forms = (prefix, *others)
            given[prefix] = next((form for form in forms if any(name.startswith(form) for name in found)), prefix)
        if all(prefix == form for prefix, form in given.items()):
            return self

        def called(name: str) -> str:
            prefix = next((prefix for prefix in given if name.startswith(prefix)), "")
            return given.get(prefix, "") + name.removeprefix(prefix)

        return replace(self.renamed(called), spellings={})

    def renamed(self, called: Callable[[str], str]) -> Table:
        """The same table under other names of the source tensors."""

        def renamed(rule: Rule) -> Rule:
            return replace(rule, sources=tuple(replace(source, name=called(source.name)) for source in rule.sources))

        return replace(
            self,
            rules=tuple(map(renamed, self.rules)),
            aliases=tuple(replace(alias, name=called(alias.name), of=called(alias.of)) for alias in self.aliases),
            asides=tuple(replace(aside, name=called(aside.name)) for aside in self.asides),
        )

    def entries(self) -> Iterator[Entry]:
        """The rules applied to every layer, in the order of the rules."""
        for rule in self.rules:
            for index in self._indices(rule.axes, rule.layers):
                yield Entry(
                    key=rule.megatron.format(**index),
                    stack=tuple(self.sizes[axis] for axis in rule.stacked),
                    index=tuple(index[axis] for axis in rule.stacked),
                    sources=tuple(self._source(source, index) for source in rule.sources),
                    layout=rule.layout,
                    less_one=rule.less_one,
                )

    def _source(self, source: Source, index: Mapping[str, int]) -> Source:
        return replace(
            source,
            name=source.name.format(**index),
            stack=tuple(self.sizes[axis] for axis in source.within),
            index=tuple(index[axis] for axis in source.within),
        )

    def aside_names(self, *, complete: bool = False) -> set[str]:
        """Names of the tensors that are kept beside the weights, if a checkpoint has them; or of the complete ones."""
        return {
            aside.name.format(**index)
            for aside in self.asides
            if aside.complete or not complete
            for index in self._indices(aside.axes, aside.layers)
        }

    def kept(self) -> dict[str, Shape]:
        """Tensors beside the weights that every checkpoint has, and their shapes."""
        return {
            aside.name.format(**index): aside.shape
            for aside in self.asides
            if aside.shape is not None
            for index in self._indices(aside.axes, aside.layers)
        }

    def _indices(self, axes: Sequence[Axis], layers: Sequence[int] | None) -> Iterator[dict[str, int]]:
        ranges = [layers if axis == "layer" and layers is not None else range(self.sizes[axis]) for axis in axes]
        for index in product(*ranges):
            yield dict(zip(axes, index, strict=True))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One slice of a Megatron tensor (one layer's, or the whole) and the source tensors it is made of."""

    key: str
    stack: Shape  # sizes of the stacking axes, () for a tensor of its own
    index: Shape  # this entry's place on them
    sources: tuple[Source, ...]
    layout: RowLayout
    less_one: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the slice, without the stacking axes."""
        try:
            return self.layout.target_shape([source.shape for source in self.sources])
        except LayoutError as error:
            raise UserError(f"{', '.join(s.name for s in self.sources)} do not make {self.key}: {error}") from None

    @property
    def global_shape(self) -> Shape:
        """Shape of the whole Megatron tensor."""
        return (*self.stack, *self.shape)

    @property
    def padded(self) -> bool:
        """Whether another padding of the rows is the same tensor."""
        return isinstance(self.layout, PadRows)

    @property
    def partial(self) -> bool:
        """Whether rows of the sources are left to other entries."""
        return prod(self.shape) < sum(prod(source.shape) for source in self.sources)

    @property
    def transposed(self) -> bool:
        """Whether the segments count columns of the sources."""
        return isinstance(self.layout, Transposed)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The slice's rows in order."""
        return self.layout.segments([source.shape for source in self.sources])

    @property
    def padding_rows(self) -> int:
        """Rows of zeros in the slice."""
        return sum(segment.rows for segment in self.segments if segment.source == PADDING)
