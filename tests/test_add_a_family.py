"""The example of docs/add-a-family.md works: its diff applies to a copy of the tree, and the new family's tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-a-family.md"
TESTS = ("tests/tools/convert/test_every_family.py", "tests/shared/families/test_registry.py")
KEYWORD = "(round_trip_and_logits or accounted_for) and larch"
PROVEN = ("test_round_trip_and_logits[larch-tiny]", "test_every_tensor_of_a_published_model_is_accounted_for[Larch-1B]")


def test_the_diff_makes_a_family(tmp_path: Path) -> None:
    """Round trip bit for bit and logits against the reference; every tensor of the published model accounted for."""
    left_out = shutil.ignore_patterns(".venv", "build", "*.egg-info", "__pycache__", "golden")
    for folder in ("shared", "tools", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    applied = subprocess.run(
        ["git", "apply", "-C1", "-"], cwd=tmp_path, input=diff, text=True, capture_output=True, check=False
    )
    assert applied.returncode == 0, f"{PAGE.name}: its diff does not apply any more; mend it there\n{applied.stderr}"
    environment = {name: value for name, value in os.environ.items() if name != "PROOFS"}
    environment |= {"PYTHONPATH": str(tmp_path), "FAMILIES": "larch"}
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *TESTS, "-k", KEYWORD]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for test in PROVEN:
        assert re.search(rf"PASSED .*::{re.escape(test)}", done.stdout), f"{test} did not run\n{done.stdout}"
