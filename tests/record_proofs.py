"""Merge recorded test results into proofs.json: `record_proofs.py FOLDER`.

Tested families are replaced; other families keep their record.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.families import registry
from tools.convert.proofs import RECORD, code, description, load

ROOT = Path(__file__).resolve().parents[1]
WORSE = ("proven", "lacking", "failed")


def revision() -> str:
    """Of the working tree, with a + if it differs from what is committed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "shared", "tools", "tests", ":!tools/*/*.json", ":!*/FAMILIES.md", ":!*/LAYOUTS.md"
    )
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def merge(lines: list[dict[str, Any]], record: dict[str, Any], now: str, at: str) -> dict[str, Any]:
    """The record with what the lines say."""
    run = f"{now} {at}"
    versions = {line["tool"]: line["versions"] for line in lines if "tool" in line}
    sizes = {name: family for family in registry.FAMILIES.values() for name in family.sizes}
    found: dict[str, Any] = {}
    for line in sorted((line for line in lines if "size" in line), key=lambda line: WORSE.index(line["result"])):
        family = sizes[line["size"]]
        entry = found.setdefault(
            family.name, {"run": run, "description": description(family), "sizes": {}, "published": {}}
        )
        entry["sizes"].setdefault(line["size"], {})[line["proof"]] = outcome(line)
    for line in (line for line in lines if "model" in line):
        if line["family"] in found:
            found[line["family"]]["published"][line["model"]] = outcome(line)
    known = record["families"] | found
    families = {name: known[name] for name in registry.names() if name in known}
    runs = record["runs"] | {run: {"date": now, "revision": at, "code": code(), "versions": versions}}
    used = {entry["run"] for entry in families.values()}
    return {"runs": {name: entry for name, entry in runs.items() if name in used}, "families": families}


def outcome(line: dict[str, Any]) -> dict[str, Any]:
    said = {name: value for name, value in line.items() if name not in ("proof", "size", "family", "model")}
    return {name: float(f"{value:.2g}") if isinstance(value, float) else value for name, value in said.items()}


def main(folder: Path) -> None:
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    record = merge(lines, load(), datetime.now(UTC).date().isoformat(), revision())
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
