"""What the folder tree promises: imports point from tools to shared, tests mirror sources, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("shared", "tools", "demo", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if ".venv" not in path.parts and "build" not in path.parts
)


def imported(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "shared"], ids=str)
def test_shared_imports_no_tool(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] in ("tools", "tests", "demo")]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "tools"], ids=str)
def test_no_tool_imports_another(path: Path) -> None:
    own = f"tools.{path.parts[1]}"
    assert not [n for n in imported(path) if n.startswith("tools") and n != own and not n.startswith(own + ".")]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[:2] in (("shared", "families"), ("shared", "mapping"))], ids=str
)
def test_families_and_mapping_know_no_megatron(path: Path) -> None:
    assert not [n for n in imported(path) if n.split(".")[0] == "megatron" or n.startswith("torch.distributed")]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_stay_readable(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{path} has {lines} lines: split it"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name.startswith("test_") and p.parts[1] in ("shared", "tools")], ids=str
)
def test_tests_mirror_sources(path: Path) -> None:
    """tests/shared/x/test_y.py stands for shared/x/y.py, or for a whole folder where several files act together."""
    folder = Path(*path.parts[1:-1])
    subject = path.stem.removeprefix("test_")
    assert (ROOT / folder).is_dir(), f"{path}: no source folder {folder}"
    known = {p.stem for p in (ROOT / folder).iterdir()} | {p.stem.replace("-", "_") for p in (ROOT / folder).iterdir()}
    assert subject in known or subject.startswith(("every_", "whole_")), f"{path} stands for no file of {folder}"
