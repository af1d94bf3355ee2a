"""No duplicated code: no six consecutive lines occur twice.

Ignored: white space, blank lines, comments, imports, lines of punctuation. Not checked: tests (examples are self-contained),
families (one file is read at a time), Dockerfiles (no way to share lines).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shared", "tools", "demo", "containers")
SUFFIXES = (".py", ".sh", ".sbatch")
RUN = 6  # lines
TRIVIAL = re.compile(r"#.*|(import|from) .*|[\W_]*")
IMPORTS = re.compile(r"^\s*from [\w.]+ import \([^)]*\)", re.MULTILINE)


# Pairs of files that still share lines. Add none; remove a pair when its duplication is gone.
STILL = {
    ("tools/convert/cli.py", "tools/convert/cli.py"),
    ("tools/convert/to_megatron.py", "tools/convert/to_te.py"),
}


def sources() -> dict[str, str]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    names = {str(path.relative_to(ROOT)): path for path in files if not {".venv", "build"}.intersection(path.parts)}
    return {
        name: path.read_text(encoding="utf-8")
        for name, path in sorted(names.items())
        if not name.startswith("shared/families/")
    }


def lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line without white space at the ends and doubled within) of every line that counts."""
    text = IMPORTS.sub(lambda found: "\n" * found.group().count("\n"), text)
    folded = [(number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in folded if not TRIVIAL.fullmatch(line)]


def repetitions(texts: dict[str, str]) -> list[str]:
    """Every pair of places that share `RUN` lines or more: `a.py:10-24 ~ b.py:40-54`."""
    content = {name: lines(text) for name, text in texts.items()}
    windows = defaultdict(list)
    for name, rows in content.items():
        for start in range(len(rows) - RUN + 1):
            windows[tuple(line for _, line in rows[start : start + RUN])].append((name, start))
    found = {
        (first, second) for places in windows.values() for i, first in enumerate(places) for second in places[i + 1 :]
    }
    reports = []
    for (one, i), (other, j) in sorted(found):
        if ((one, i - 1), (other, j - 1)) in found:
            continue  # the middle of a longer run
        length = RUN
        while ((one, i + length - RUN + 1), (other, j + length - RUN + 1)) in found:
            length += 1
        spans = [
            f"{name}:{content[name][start][0]}-{content[name][start + length - 1][0]}"
            for name, start in ((one, i), (other, j))
        ]
        reports.append(" ~ ".join(spans))
    return reports


def test_no_six_lines_stand_in_two_places() -> None:
    found = {report: tuple(re.findall(r"([^ ]+):[0-9-]+", report)) for report in repetitions(sources())}
    new = [report for report, files in found.items() if files not in STILL]
    assert not new, "duplicated code; keep one of each pair:\n" + "\n".join(new)
    gone = STILL - set(found.values())
    assert not gone, f"no longer duplicated; remove from STILL: {sorted(gone)}"


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("x = 0\na = 1\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\n", ["one:1-6 ~ two:2-7"]),
        (
            "a  =  1\n\n    b = 2\n# why\nc = 3\nfrom os import (\n    path,\n)\nd = 4\n)\ne = 5\nf = 6\n",
            ["one:1-6 ~ two:1-12"],
        ),
        ("a = 1\nb = 2\nc = 3\nd = 4\ne = 5\n", []),
        ("a = 1\nb = 2\nc = 3\nx = 0\nd = 4\ne = 5\nf = 6\n", []),
    ],
    ids=["moved", "laid out differently", "five lines", "another line between"],
)
def test_what_counts_as_a_repetition(second: str, expected: list[str]) -> None:
    assert repetitions({"one": "a = 1\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\n", "two": second}) == expected
