"""Numbers of the demo, read from what the stages published. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reward import parses


def parse_rate(directory: Path) -> float:
    """Share of the replies in `infer generate`'s output that complete their function as Python."""
    rewards: list[float] = []
    for row in _rows(directory / "generations.jsonl"):
        request = row["messages"][-1]["content"]
        replies = row["completions"] if "completions" in row else [row["completion"]]
        rewards += parses([request] * len(replies), replies)
    return sum(rewards) / len(rewards)


def bits_per_byte(directory: Path) -> float:
    """Held-out bits per byte in `infer evaluate`'s output."""
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return float(results["results"]["heldout"]["bits_per_byte,none"])


def curve(directory: Path, key: str) -> list[float]:
    """One number of every line of a run's metrics.jsonl that has it."""
    return [float(row[key]) for row in _rows(directory / "metrics.jsonl") if isinstance(row.get(key), int | float)]


def size_on_disk(path: Path) -> int:
    """Bytes of all files of a directory, or of one file."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def facts(directory: Path) -> dict[str, Any]:
    """What a stage says of its output."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return dict(manifest["facts"])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
