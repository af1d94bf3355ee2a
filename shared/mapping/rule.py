"""Rules: rows of a family's tensor table. Entries: rules expanded over layers, experts and heads.

Rule: `Megatron key | axes | source names | layout`. Axes are `{layer}`, `{expert}`, `{query_head}`, `{key_head}` in
names. An axis absent from the Megatron key is stacked: over `layer` one tensor `[layers, ...]`, over `layer` and
`expert` `[layers, experts, ...]`. Megatron-Core stacks homogeneous layers; heterogeneous layers have `{layer}` in the key.
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
# Prefix of source names -> its variants in other published files.
PrefixVariants = Mapping[str, tuple[str, ...]]


def name_variants(name: str, prefix_variants: PrefixVariants) -> list[str]:
    """The name, then the name under every variant of its prefix."""
    names = [name]
    for prefix, others in prefix_variants.items():
        forms = (prefix, *others)
        names += [other + name.removeprefix(form) for form in forms if name.startswith(form) for other in forms]
    return names


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face tensor. Several rules may split its rows."""

    name: str
    shape: Shape  # without `stacked_axes`
    stacked_axes: tuple[Axis, ...] = ()  # leading dimensions of the stored tensor, `[experts, ...]`
    stack: Shape = ()  # sizes of the stacked axes (of an entry)
    index: Shape = ()  # this entry's index on them
    fp32: bool = False  # stored in float32 whatever the model's dtype
    # Initialisation. usual: normal(0, initializer_range), biases 0, norms 1. normal: biases too. one: ones.
    # log: log of uniform(0.01, 16).
    init: Literal["usual", "normal", "one", "log"] = "usual"

    @property
    def stored_shape(self) -> Shape:
        """Shape of the whole stored tensor."""
        return (*self.stack, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One Megatron tensor and the source tensors it is made of."""

    megatron: str
    sources: tuple[Source, ...]
    layout: RowLayout = COPY
    axes: tuple[Axis, ...] = ()
    layers: tuple[int, ...] | None = None  # layers that have it; None: all
    zero_centered_gamma: bool = False  # Megatron weight = source weight - 1 (layernorm_zero_centered_gamma)

    @property
    def stacked_axes(self) -> tuple[Axis, ...]:
        """The axes that are dimensions of the Megatron tensor."""
        return tuple(axis for axis in self.axes if f"{{{axis}}}" not in self.megatron)


@dataclass(frozen=True, kw_only=True)
class TiedTensor:
    """A source tensor that duplicates another if it is stored: a tied output head."""

    name: str
    tied_to: str
    always: bool = False  # tied even with `tie_word_embeddings` false


@dataclass(frozen=True, kw_only=True)
class PassThroughTensor:
    """A source tensor without a Megatron counterpart: stored unchanged in `hf/`, restored on export."""

    name: str
    axes: tuple[Axis, ...] = ("layer",)
    layers: tuple[int, ...] | None = None
    all_or_none: bool = False  # a checkpoint has all tensors with this mark, or none
    shape: Shape | None = None  # given: required in every checkpoint (a vision tower); None: optional (`inv_freq`)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every tensor of one model."""

    rules: tuple[Rule, ...]
    tied_tensors: tuple[TiedTensor, ...] = ()
    pass_through: tuple[PassThroughTensor, ...] = ()
    prefix_variants: PrefixVariants = field(default_factory=dict)
    # The same Megatron tensors made of other sources, as some files store them: experts fused into one tensor.
    alternatives: tuple[Rule, ...] = ()
    sizes: Mapping[Axis, int]

    def with_names_of(self, found: Collection[str]) -> Table:
        """The table as the stored names have it: for each prefix the first variant found, and alternatives that are found."""
        table = self._with_prefixes_of(found)
        used = {rule.megatron: rule for rule in table.alternatives if any(name in found for name in table._names(rule))}
        if not used:
            return table
        return replace(table, rules=tuple(used.get(rule.megatron, rule) for rule in table.rules), alternatives=())

    def names(self) -> set[str]:
        """Source names of all rules and alternatives."""
        return {name for rule in (*self.rules, *self.alternatives) for name in self._names(rule)}

    def _names(self, rule: Rule) -> Iterator[str]:
        for index in self._indices(rule.axes, rule.layers):
            yield from (source.name.format(**index) for source in rule.sources)

    def _with_prefixes_of(self, found: Collection[str]) -> Table:
        given: dict[str, str] = {}
        for prefix, others in self.prefix_variants.items():
            forms = (prefix, *others)
            given[prefix] = next((form for form in forms if any(name.startswith(form) for name in found)), prefix)
        if all(prefix == form for prefix, form in given.items()):
            return self

        def called(name: str) -> str:
            prefix = next((prefix for prefix in given if name.startswith(prefix)), "")
            return given.get(prefix, "") + name.removeprefix(prefix)

        return replace(self.renamed(called), prefix_variants={})

    def renamed(self, called: Callable[[str], str]) -> Table:
        """The table with renamed source tensors."""

        def renamed(rule: Rule) -> Rule:
            return replace(rule, sources=tuple(replace(source, name=called(source.name)) for source in rule.sources))

        return replace(
            self,
            rules=tuple(map(renamed, self.rules)),
            alternatives=tuple(map(renamed, self.alternatives)),
            tied_tensors=tuple(
                replace(tied, name=called(tied.name), tied_to=called(tied.tied_to)) for tied in self.tied_tensors
            ),
            pass_through=tuple(replace(tensor, name=called(tensor.name)) for tensor in self.pass_through),
        )

    def entries(self) -> Iterator[Entry]:
        """The rules expanded over their axes, in the order of the rules."""
        for rule in self.rules:
            for index in self._indices(rule.axes, rule.layers):
                yield Entry(
                    key=rule.megatron.format(**index),
                    stack=tuple(self.sizes[axis] for axis in rule.stacked_axes),
                    index=tuple(index[axis] for axis in rule.stacked_axes),
                    sources=tuple(self._source(source, index) for source in rule.sources),
                    layout=rule.layout,
                    zero_centered_gamma=rule.zero_centered_gamma,
                )

    def _source(self, source: Source, index: Mapping[str, int]) -> Source:
        return replace(
            source,
            name=source.name.format(**index),
            stack=tuple(self.sizes[axis] for axis in source.stacked_axes),
            index=tuple(index[axis] for axis in source.stacked_axes),
        )

    def pass_through_names(self, *, all_or_none: bool = False) -> set[str]:
        """Names of all pass-through tensors, or of those marked `all_or_none`."""
        return {
            tensor.name.format(**index)
            for tensor in self.pass_through
            if tensor.all_or_none or not all_or_none
            for index in self._indices(tensor.axes, tensor.layers)
        }

    def required_pass_through(self) -> dict[str, Shape]:
        """Names and shapes of the pass-through tensors that every checkpoint has."""
        return {
            tensor.name.format(**index): tensor.shape
            for tensor in self.pass_through
            if tensor.shape is not None
            for index in self._indices(tensor.axes, tensor.layers)
        }

    def _indices(self, axes: Sequence[Axis], layers: Sequence[int] | None) -> Iterator[dict[str, int]]:
        ranges = [layers if axis == "layer" and layers is not None else range(self.sizes[axis]) for axis in axes]
        for index in product(*ranges):
            yield dict(zip(axes, index, strict=True))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One slice of a Megatron tensor (one layer, one expert) and the source tensors it is made of."""

    key: str
    stack: Shape  # sizes of the stacked axes, () for a tensor that is not stacked
    index: Shape  # this entry's index on them
    sources: tuple[Source, ...]
    layout: RowLayout
    zero_centered_gamma: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of the slice, without the stacked axes."""
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
        """Whether rows beyond the source's are padding (vocabulary)."""
        return isinstance(self.layout, PadRows)

    @property
    def partial(self) -> bool:
        """Whether other entries take the remaining rows of the sources."""
        return prod(self.shape) < sum(prod(source.shape) for source in self.sources)

    @property
    def transposed(self) -> bool:
        """Whether the segments count source columns."""
        return isinstance(self.layout, Transposed)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments in the order of the slice's rows."""
        return self.layout.segments([source.shape for source in self.sources])

    @property
    def padding_rows(self) -> int:
        """Number of zero rows in the slice."""
        return sum(segment.rows for segment in self.segments if segment.source == PADDING)
