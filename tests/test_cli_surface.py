"""The command lines of all tools equal tests/golden/command_line.txt; `make command-line` records them again."""

from __future__ import annotations

import difflib
import subprocess
import sys
from typing import Annotated

from pydantic import Field

from shared.cli import ExistingFile, NonNegative, Tool
from tests.command_line import ROOT, SNAPSHOT, described, surface
from tests.tools.command_table import HEAVY


def test_command_lines_are_those_recorded() -> None:
    recorded, found = SNAPSHOT.read_text(encoding="utf-8").splitlines(), surface().splitlines()
    changes = "\n".join(difflib.unified_diff(recorded, found, "recorded", "found", lineterm="", n=1))
    assert not changes, (
        f"`make command-line` records what was meant; CHANGELOG.md says what users must change\n{changes}"
    )


def test_every_part_of_a_flag_is_recorded() -> None:
    tool = Tool("tool", summary="A tool.")

    def work(
        source: ExistingFile,
        share: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        names: tuple[NonNegative, ...] = (),
        late: bool = False,
    ) -> None:
        """Work."""

    tool.command(positional=("source",), not_fingerprinted=("share",), added=("late",))(work)
    assert described(tool, tool.commands["work"]) == [
        "tool work [SOURCE]",
        "  --source PATH existing_file required",
        "  --share NUMBER ge=0 lt=1 = 0.5, not in the fingerprint",
        "  --names INT,... ge=0 le=2147483647 = ()",
        "  --late true|false = False, in the fingerprint unless at its default",
        "",
    ]


def test_it_is_made_without_a_tensor_library() -> None:
    code = f"import sys, tests.command_line as c; c.surface(); print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
