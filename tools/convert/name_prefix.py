"""Wrappers' prefixes of tensor names (DDP, torch.compile, FSDP, TRL, PEFT)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from shared.checkpoint.formats.hugging_face import HfReader
from shared.cli import log
from shared.errors import UserError
from shared.mapping.rule import Table, name_variants


def check_prefix(reader: HfReader, table: Table, stripped: str | None) -> None:
    """UserError, with the mend, if the names lie under a wrapper's prefix."""
    known = {form for name in table.names() for form in name_variants(name, table.prefix_variants)}
    found = reader.weights.keys()
    if stripped and not known & found:
        raise UserError(
            f"--strip-prefix {stripped}: no tensor name of {reader.path} is the model's without it; {_names(found)}"
        )
    prefixes = Counter(
        name[: dot.end()] for name in found - known for dot in re.finditer(r"\.", name) if name[dot.end() :] in known
    )
    prefix, count = min(prefixes.items(), key=lambda item: (-item[1], len(item[0])), default=("", 0))
    if count > len(known & found):
        raise UserError(
            f"{reader.path}: the tensor names begin with {prefix}, which a wrapper left; "
            f"give --strip-prefix {stripped or ''}{prefix}"
        )


def stripped_fact(prefix: str | None) -> dict[str, Any]:
    """The manifest's fact of --strip-prefix; said in the log, too."""
    if not prefix:
        return {}
    log(f"tensor names: {prefix} stripped (--strip-prefix); to-hf gives the plain names")
    return {"stripped_prefix": prefix}


def _names(found: Any) -> str:
    return f"they are like {min(found)}"
