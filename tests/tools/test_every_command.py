"""The table of command-line mistakes, on every command of every tool, in the tool's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("convert", "pretrain", "sft", "rlhf", "infer")

BEYOND = ("=-1", "nan", "inf", "1e400", "=100000000000000000000", "=1e30", f"={2**32}")

USAGE_ERRORS = (
    "unknown flag",
    "abbreviated flag",
    "repeated flag",
    "missing value",
    "extra word",
    "after --",
    "wrong type",
    "no arguments",
    "no such path",
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    (place / "file.jsonl").write_text("{}\n")
    return place


@cache
def table(tool: str, place: Path) -> dict[str, Any]:
    python = ROOT / "tools" / tool / ".venv" / "bin" / "python"
    answer = subprocess.run(
        [python, Path(__file__).with_name("command_table.py"), tool, place], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def rows(tool: str, place: Path, *names: str) -> Iterator[dict[str, Any]]:
    return (row for row in table(tool, place)["rows"] if row["row"] in names)


@pytest.mark.parametrize("row", USAGE_ERRORS)
@pytest.mark.parametrize("tool", TOOLS)
def test_usage_errors_exit_2_with_one_line_and_run_nothing(tool: str, row: str, place: Path) -> None:
    for result in rows(tool, place, row):
        assert (result["code"], result["out"], result["ran"]) == (2, "", False), result
        assert result["err"].startswith(f"{tool} {result['command']}: error: "), result
        assert result["err"].count("\n") == 1, result
        if row == "abbreviated flag":
            assert "did you mean --" in result["err"], result


@pytest.mark.parametrize("tool", TOOLS)
def test_numbers_beyond_their_range_exit_2_and_name_the_flag(tool: str, place: Path) -> None:
    for result in rows(tool, place, "out of range"):
        wrong = {word.partition("=")[0] for word in result["words"] if word.endswith(BEYOND)}
        assert (result["code"], result["out"], result["ran"]) == (2, "", False), result
        assert any(f"error: {name} " in result["err"] for name in wrong), result
        assert result["err"].count("\n") == 1, result
    for result in rows(tool, place, "in range"):
        assert (result["code"], result["ran"]) == (0, True), result


@pytest.mark.parametrize("tool", TOOLS)
def test_help_anywhere_is_help_and_nothing_runs(tool: str, place: Path) -> None:
    for result in rows(tool, place, "help first", "help last", "help amid nonsense"):
        assert (result["code"], result["err"], result["ran"]) == (0, "", False), result
        assert result["out"].startswith(f"Usage: {tool} {result['command']}"), result


@pytest.mark.parametrize("tool", TOOLS)
def test_help_for_a_reader_that_left_is_no_error(tool: str) -> None:
    read, write = os.pipe()
    os.close(read)
    script = ROOT / "tools" / tool / ".venv" / "bin" / tool
    done = subprocess.run([script, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tool", TOOLS)
def test_false_is_false_and_the_command_runs(tool: str, place: Path) -> None:
    for result in rows(tool, place, "false is false"):
        assert (result["code"], result["ran"]) == (0, True), result
        assert not any(result["flags"]), result


@pytest.mark.parametrize("tool", TOOLS)
def test_every_flag_is_documented_and_few_are_required(tool: str, place: Path) -> None:
    documented = list(rows(tool, place, "documented"))
    assert documented
    for result in documented:
        assert result["undocumented"] == [], result
        assert result["summary"], result
        # a policy, its prompts, its reward and the target: none of the four is known to another
        assert result["required"] <= (4 if result["command"] in ("ppo", "grpo", "rloo") else 3), result


@pytest.mark.parametrize("tool", TOOLS)
def test_no_heavy_import_before_a_command_runs(tool: str, place: Path) -> None:
    assert table(tool, place)["heavy"] == []


@pytest.mark.parametrize("tool", TOOLS)
def test_the_console_script_answers_in_under_a_second(tool: str, place: Path) -> None:
    script = ROOT / "tools" / tool / ".venv" / "bin" / tool
    command = next(rows(tool, place, "documented"))["command"]
    spent = []
    for _ in range(3):
        answer = subprocess.run(
            ["bash", "-c", f"TIMEFORMAT='%U %S'; time {script} {command} --bogus"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 2
        spent.append(sum(map(float, answer.stderr.splitlines()[-1].split())))
    assert min(spent) < 1.0  # processor seconds: the machine that runs the tests may be busy
