"""Strict accounting: every tensor of a checkpoint is matched with the table before any byte is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import Protocol

from shared.errors import UserError
from shared.mapping.key_form import KeyForm, key_of_norm
from shared.mapping.layout import Shape, segments_of_source
from shared.mapping.rule import Entry, Table, TiedTensor


class Found(Protocol):
    """Shape and file of a stored tensor."""

    @property
    def shape(self) -> Shape: ...

    @property
    def place(self) -> str:
        """The file that contains it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Account:
    """A checkpoint's tensors: converted, tied, pass-through."""

    entries: tuple[Entry, ...]
    tied_tensors: tuple[TiedTensor, ...]  # stored in this checkpoint
    pass_through: tuple[str, ...]  # stored in this checkpoint


def account_sources(table: Table, found: Mapping[str, Found], where: str) -> Account:
    """Match a Hugging Face checkpoint's tensors with the table: none missing, none unknown, all shapes right.

    Raises:
        UserError: naming the tensor, both shapes, and the file.
    """
    for axis, size in table.sizes.items():
        if size > len(found) and any(f"{{{axis}}}" in source.name for rule in table.rules for source in rule.sources):
            raise UserError(
                f"{where}: {len(found)} tensors in all, though config.json asks for {size} {axis.replace('_', ' ')}s; "
                "correct config.json, or fetch the model again"
            )
    table = table.with_names_of(found)
    entries = tuple(table.entries())
    wanted = {source.name: source.stored_shape for entry in entries for source in entry.sources}
    _check_rows(entries, wanted)
    wanted |= table.required_pass_through()
    tied_tensors = tuple(tied for tied in table.tied_tensors if tied.name in found)
    pass_through = tuple(sorted(table.pass_through_names() & found.keys()))
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{where}: {_some(missing)} missing, though config.json asks for it; fetch the model again")
    together = table.pass_through_names(all_or_none=True)
    if together & found.keys() and (missing := sorted(together - found.keys())):
        raise UserError(
            f"{where}: {_some(missing)} missing, though {sorted(together & found.keys())[0]} is there; fetch the model again"
        )
    known = wanted.keys() | {tied.name for tied in tied_tensors} | set(pass_through)
    if unknown := sorted(found.keys() - known):
        near = get_close_matches(unknown[0], list(wanted), n=1, cutoff=0.0)
        raise UserError(
            f"{found[unknown[0]].place}: {_some(unknown)} unknown to this family and would be lost"
            f"{f' (nearest: {near[0]})' if near else ''}; remove it, or correct config.json"
        )
    wanted |= {tied.name: wanted[tied.tied_to] for tied in tied_tensors}
    if empty := [name for name, shape in wanted.items() if 0 in found[name].shape and 0 not in shape]:
        raise UserError(
            f"{found[empty[0]].place}: {_some(empty)} empty, as ZeRO-3 and FSDP save weights that are not gathered; gather "
            "them when saving (DeepSpeed: stage3_gather_16bit_weights_on_model_save), or join the ranks"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].place}: {name} is {list(found[name].shape)}, config.json asks for {list(shape)}"
            )
    return Account(entries=entries, tied_tensors=tied_tensors, pass_through=pass_through)


def _check_rows(entries: Iterable[Entry], shapes: Mapping[str, Shape]) -> None:
    """Entries may split the rows of one source: together they use each row of each stacked slice once."""
    users: dict[tuple[str, Shape], list[tuple[Entry, int]]] = {}
    for entry in entries:
        for place, source in enumerate(entry.sources):
            assert source.stored_shape == shapes[source.name], f"a table says two shapes of {source.name}"
            users.setdefault((source.name, source.index), []).append((entry, place))
    slices = Counter(name for name, _ in users)
    for (name, _), parts in users.items():
        entry, place = parts[0]
        assert slices[name] == prod(entry.sources[place].stack), f"a table uses each slice of a source once: {name}"
        if len(parts) == 1 and not parts[0][0].partial:
            continue
        taken = sorted(
            (s.source_row, s.rows) for entry, place in parts for s in segments_of_source(entry.segments, place)
        )
        row = 0
        for first, rows in taken:
            assert first == row, f"a table uses each row of a source once: row {row} of {name}"
            row += rows
        assert row == entry.sources[place].shape[0], f"a table uses each row of a source once: row {row} of {name}"


def account_targets(
    table: Table, found: Mapping[str, Found], where: str, ignored: Sequence[str] = ()
) -> tuple[Entry, ...]:
    """Match a Megatron checkpoint's tensors with the table, in the form of its keys.

    `ignored`: prefixes of keys that are not weights.

    Raises:
        UserError: naming the tensor, both shapes, and the directory.
    """
    entries = tuple(
        entry if entry.key in found else replace(entry, key=key_of_norm(entry.key, found))
        for entry in KeyForm.of(found).table(table).entries()
    )
    wanted = {entry.key: entry for entry in entries}
    if missing := [key for key in wanted if key not in found]:
        raise UserError(
            f"{where}: {_some(missing)} missing, though hf/config.json asks for it; put the right hf/config.json there, or "
            "fetch the checkpoint again"
        )
    unknown = sorted(key for key in found.keys() - wanted.keys() if not key.startswith(tuple(ignored)))
    if unknown:
        raise UserError(
            f"{where}: {_some(unknown)} unknown to this family and would be lost; put the right hf/config.json there"
        )
    for key, entry in wanted.items():
        shape, expected = found[key].shape, entry.global_shape
        rows = len(entry.stack)
        fits = shape == expected
        if entry.padded and len(shape) == len(expected):  # vocabulary padded for another tensor-parallel size
            kept = expected[rows] - entry.padding_rows
            fits = shape[rows] >= kept and shape[:rows] + shape[rows + 1 :] == expected[:rows] + expected[rows + 1 :]
        if not fits:
            raise UserError(f"{where}: {key} is {list(shape)}, hf/config.json asks for {list(expected)}")
    return entries


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} is" if not rest else f"{first} and {len(rest)} more are"
