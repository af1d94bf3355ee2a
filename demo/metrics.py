"""Metrics of the demo, read from the published directories. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_rate(directory: Path) -> float:
    """Share of the replies to held-out requests that complete their function as Python."""
    return _score(directory, "replies", "parses,samples")


def reply_length(directory: Path) -> float:
    """Mean characters of the replies to held-out requests."""
    return _score(directory, "replies", "characters,samples")


def bits_per_byte(directory: Path) -> float:
    """Bits per byte of held-out text."""
    return _score(directory, "heldout", "bits_per_byte,none")


def _score(directory: Path, task: str, metric: str) -> float:
    """A metric in the results of `infer evaluate`."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return float(results["results"][task][metric])


def curve(directory: Path, key: str) -> list[float]:
    """The values of one key in a run's metrics.jsonl; lines without it are skipped."""
    return [float(row[key]) for row in _rows(directory / "metrics.jsonl") if isinstance(row.get(key), int | float)]


def size_on_disk(path: Path) -> int:
    """Bytes of all files of a directory, or of one file."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def lines(path: Path) -> int:
    """Lines of a file that are not empty."""
    return len(_lines(path))


def facts(directory: Path) -> dict[str, Any]:
    """Manifest entries of a stage's output."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return dict(manifest["facts"])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
