"""The compared tasks, each run in its own process: `python work.py NAME SOURCE TARGET`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def rewrite(source: Path, target: Path) -> None:
    """Map each safetensors file into memory and write it anew with the library that everybody has."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            save_file({name: opened.get_tensor(name) for name in opened.keys()}, target / file.name)  # noqa: SIM118


class _NoHash:
    """Stands in for a hash that costs nothing."""

    def update(self, data: object) -> None: ...

    def reset(self) -> None: ...

    def hexdigest(self) -> str:
        return ""


def without_hashes(command: str, source: Path, target: Path) -> None:
    """A conversion by the library that neither hashes what it writes nor checks what it reads; archives have no checksums."""
    execute = importlib.import_module("shared.checkpoint.copy.worker_pool")
    writer = importlib.import_module("shared.checkpoint.formats.torch_dist_writer")
    module = importlib.import_module(f"tools.convert.{command.replace('-', '_')}")
    cli = importlib.import_module("tools.convert.cli")

    class Hashes:
        xxh3_128 = _NoHash

    execute.xxhash = Hashes  # type: ignore[attr-defined]
    module.content_checks = lambda *arguments, **named: []  # type: ignore[attr-defined]
    writer.crc32 = lambda data, value=0: 0  # type: ignore[attr-defined]
    convert(cli.tool, command, source, target)


def convert(tool: Any, command: str, source: Path, target: Path) -> None:
    tool.run([command, "--source", str(source), "--target", str(target)])


def run_in_process(tool: Any, command: str, **flags: Any) -> None:
    """Run a command of a tool in this process; SystemExit where it does not end with 0."""
    words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    try:
        tool.run([command, *words])
    except SystemExit as end:
        if end.code:
            raise


def main(name: str, source: Path, target: Path) -> None:
    if name == "rewrite":
        rewrite(source, target)
    elif name.startswith("bare-"):
        without_hashes(name.removeprefix("bare-"), source, target)
    else:
        convert(importlib.import_module("tools.convert.cli").tool, name, source, target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
