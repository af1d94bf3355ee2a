"""docs/architecture.md lists every folder of shared; every decision record is listed and complete."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_picture_has_every_folder_of_shared() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = page.split("```text")[1].split("```")[0]
    folders = {path.parent.name for path in (ROOT / "shared").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"\w+", drawing)), folders - set(re.findall(r"\w+", drawing))


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d[^)]+)\)", (folder / "README.md").read_text(encoding="utf-8")) == pages
    for name in pages:
        headings = re.findall(r"^## (.*)$", (folder / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequence"], name
