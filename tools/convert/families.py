"""`convert families`: the supported model families and the named sizes of each."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from shared.families import registry


def run() -> None:
    """Print the table."""
    table = Table("model_type", "models", "transformers class", "sizes for convert init", box=None)
    for family in registry.FAMILIES.values():
        sizes = [f"{name} ({_short(size.parameter_count())})" for name, size in family.sizes.items()]
        table.add_row(family.name, family.title, family.hf_class, "\n".join(sizes))
    Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _short(parameters: int) -> str:
    for divisor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= divisor:
            return f"{parameters / divisor:.3g}{unit}"
    return str(parameters)
