"""Wrappers' prefixes of tensor names (DDP, torch.compile, FSDP, TRL, PEFT)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from shared.checkpoint.formats.hugging_face import HfReader, without_prefix
from shared.cli import log
from shared.errors import UserError
from shared.mapping.rule import Table, name_variants

_SAMPLE = 100  # names from which wrappers are guessed


def check_prefix(reader: HfReader, table: Table, stripped: str | None) -> None:
    """UserError, with the fix, if the names lie under a wrapper's prefix."""
    known = {form for name in table.names() for form in name_variants(name, table.prefix_variants)}
    found = reader.weights.keys()
    if stripped and not known & found:
        raise UserError(
            f"--strip-prefix {stripped}: no tensor name of {reader.path} is the model's without it; {_names(found)}"
        )
    if adapted := min((name for name in found if ".lora_A." in name), default=None):
        raise UserError(
            f"{reader.weights[adapted].place}: {adapted} is of an adapter that is not merged into its base; save the model after "
            "peft's merge_and_unload, or the adapter alone, and merge that with `convert merge-lora`"
        )
    unknown = found - known
    wrappers = {wrapper for name in sorted(unknown)[:_SAMPLE] for wrapper in _wrappers(name, known)}
    counts = Counter({w: sum(without_prefix(name, w) in known for name in unknown) for w in wrappers})
    prefix, count = min(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]), default=("", 0))
    if count > len(known & found):
        raise UserError(
            f"{reader.path}: the tensor names contain {prefix}, which a wrapper left; "
            f"give --strip-prefix {stripped or ''}{prefix}"
        )


def _wrappers(name: str, known: set[str]) -> Iterator[str]:
    """What, taken out of a name between two dots, leaves a known name."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    for first, last in combinations(starts, 2):
        wrapper = name[first:last]
        if without_prefix(name, wrapper) in known:
            yield wrapper


def stripped_fact(prefix: str | None) -> dict[str, Any]:
    """The manifest's fact of --strip-prefix; said in the log, too."""
    if not prefix:
        return {}
    log(f"tensor names: {prefix} stripped (--strip-prefix); to-hf gives the plain names")
    return {"stripped_prefix": prefix}


def _names(found: Any) -> str:
    return f"they are like {min(found)}"
