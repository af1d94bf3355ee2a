"""README commands: shell syntax, tools' flags, make targets, paths; every tool command is shown."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("convert", "pretrain", "sft", "rlhf", "infer")
FOLDERS = ("", "docs/", "docs/*/", "tools/*/", "demo/", "containers/", "containers/*/")
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))


def blocks(document: Path) -> list[str]:
    return re.findall(
        r"^```(?:bash|sh|shell)\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(document: Path) -> list[str]:
    joined = "\n".join(blocks(document)).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def in_container(line: str, tool: str) -> str | None:
    """The tool's command line within `docker run ... TOOL[:TAG] ...` or `baton ... TOOL ...`, else None."""
    if not re.match(r"(\w+=\S* )*(docker run|baton) ", line) or "--entrypoint" in line:
        return None
    words = shlex.split(line, comments=True)
    places = [place for place, word in enumerate(words) if re.fullmatch(rf"{tool}(:[\w.-]+)?", word)]
    return shlex.join([tool, *words[places[0] + 1 :]]) if places else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_are_shell(document: Path) -> None:
    for block in blocks(document):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, f"{checked.stderr}\n{block}"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_command_line_is_accepted_by_its_tool(tool: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text("{}\n")
    start = re.compile(rf"(?:\w+=\S* )*((?:\S*/)?{tool} .*)")  # variables of the environment may stand before it
    every = [(d, re.sub(r"\s[|&>].*", "", line)) for d in DOCUMENTS for line in commands(d)]
    found = [(d, words[1]) for d, line in every if (words := start.match(line))]
    found += [(d, words) for d, line in every if (words := in_container(line, tool))]
    assert any(d.parent.name == tool for d, _ in found), f"tools/{tool}/README.md shows no command"
    assert tool != "rlhf" or any("--backend trlx" in line for _, line in found)
    answer = subprocess.run(
        [ROOT / "tools" / tool / ".venv/bin/python", Path(__file__).with_name("readme_commands.py"), tool, tmp_path],
        input="\n".join(line for _, line in found),
        text=True,
        capture_output=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    for (document, line), (code, error) in zip(found, json.loads(answer.stdout), strict=True):
        assert code == 0, f"{document.name}: {line}\n{error}"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_command_is_shown_in_its_readme(tool: str) -> None:
    text = "\n".join(commands(ROOT / "tools" / tool / "README.md"))
    source = (ROOT / "tools" / tool / "cli.py").read_text(encoding="utf-8")
    for name in re.findall(r"^@tool\.command.*?\ndef (\w+)\(", source, re.MULTILINE | re.DOTALL):
        assert f"{tool} {name.rstrip('_').replace('_', '-')}" in text


@pytest.mark.parametrize("tool", TOOLS)
def test_every_command_is_shown_in_a_container(tool: str) -> None:
    lines = commands(ROOT / "tools" / tool / "README.md")
    known = {line.split()[1] for line in lines if line.startswith(f"{tool} ")}
    shown = {words.split()[1] for line in lines if (words := in_container(line, tool))}
    assert known
    assert shown == known


def test_the_function_that_the_pages_use_is_written_down() -> None:
    """`baton` passes its arguments to docker run unchanged, after its own flags."""
    (block,) = [block for block in blocks(ROOT / "README.md") if "baton() {" in block]
    definition = block[: block.index("\n}\n") + 3]
    called = f'docker() {{ printf "%s\\n" "$@"; }}\n{definition}baton --gpus all convert verify --target "a b"'
    words = subprocess.run(["bash", "-c", called], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[0] == "run"
    assert words[-6:] == ["--gpus", "all", "convert", "verify", "--target", "a b"]
    assert {"--read-only", "--cap-drop", "--network", "--user"} <= set(words)


def test_every_make_target_named_exists() -> None:
    lines = [line for document in DOCUMENTS for line in commands(document) if line.startswith("make ")]
    assert lines
    for line in lines:
        target = line.split()[1]
        planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert planned.returncode == 0, f"{line}\n{planned.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_named_exists(document: Path) -> None:
    """Links, and paths from the root in code spans; `<tool>` stands for each tool."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [document.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    spans = re.findall(r"`((?:shared|tools|tests|containers|demo|docs)/[\w./<>-]+)`", text)
    named = [ROOT / span.replace("<tool>", tool) for span in spans for tool in TOOLS]
    missing = sorted({str(path) for path in (*links, *named) if "<" not in path.name and not path.exists()})
    assert not missing
