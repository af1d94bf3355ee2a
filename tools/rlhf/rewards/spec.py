"""Parses `--reward`: components and weights. Standard library only, so errors are reported before slow imports."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError
from shared.foreign_formats import absent, not_a_directory
from tools.rlhf.rewards.imported_files import imported_files

_FORM = re.compile(r"(?:(?P<weight>[^*]*)\*)?(?P<kind>model|py):(?P<rest>.+)")


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """One component of the reward: `[WEIGHT*]model:DIR` or `[WEIGHT*]py:FILE:FUNCTION`."""

    weight: float
    path: Path
    """Directory of a reward model, or file of a Python function."""
    function: str | None
    """Function name; None for a reward model."""

    @property
    def name(self) -> str:
        """Name in logs and metrics."""
        return self.function or self.path.resolve().name

    @property
    def files(self) -> list[Path]:
        """What the component is made of: the directory, or the Python file and those it imports from its folder."""
        return [self.path] if self.function is None else [self.path, *imported_files(self.path)]


def parse(text: str) -> tuple[RewardSpec, ...]:
    """Parse comma-separated components.

    Raises:
        UserError: malformed component, non-finite weight, missing path or duplicate name.
    """
    parts = [_component(part.strip()) for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("--reward is empty; give model:DIR or py:FILE:FUNCTION")
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--reward names {twice!r} twice; add the weights up, or rename one of the two")
    return tuple(parts)


def _component(text: str) -> RewardSpec:
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserError(f"--reward {text!r}: write model:DIR or py:FILE:FUNCTION, with a weight as in 0.5*model:DIR")
    try:
        weight = float(match["weight"]) if match["weight"] is not None else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--reward {text!r}: the weight {match['weight']!r} is not a finite number")
    if match["kind"] == "model":
        path = Path(match["rest"])
        if not path.is_dir():
            what = not_a_directory(path) if path.exists() else absent(path)
            raise UserError(f"--reward {text!r}: {path} {what} (wanted: what `rlhf reward` published)")
        return RewardSpec(weight=weight, path=path, function=None)
    file, colon, function = match["rest"].rpartition(":")
    if not colon or not function.isidentifier():
        raise UserError(f"--reward {text!r}: write py:FILE:FUNCTION")
    if not Path(file).is_file():
        raise UserError(f"--reward {text!r}: the file {file} does not exist")
    return RewardSpec(weight=weight, path=Path(file), function=function)
