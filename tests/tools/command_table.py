"""Try every command-line mistake on every command of one tool, in one process; print what happened as JSON.

Run by test_every_command.py in the tool's environment: `python command_table.py TOOL FOLDER`. Commands are replaced
by a function that records the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import sys
from typing import Annotated, Any, get_args, get_origin

from shared.cli import Command, Tool, flags_of
from shared.help import documentation, flag_name, type_text

HEAVY = {"torch", "transformers", "megatron", "vllm", "deepspeed", "trl", "datasets"}


def plausible(hint: object, here: str) -> str:
    """A value that passes the annotation's check."""
    text = repr(hint)
    if "_existing_file" in text:
        return f"{here}/file.jsonl"
    if "_existing" in text:
        return here
    if "Path" in text:
        return f"{here}/target"
    return "1" if "int" in text else "text"


def is_int(hint: object) -> bool:
    return hint is int or (get_origin(hint) is Annotated and get_args(hint)[0] is int)


def numbers(command: Command, here: str) -> list[tuple[str, list[str]]]:
    """(row, words) of values at and beyond the bounds of every numeric flag."""
    required = [name for name, spec in command.parameters.items() if spec.default is inspect.Parameter.empty]
    whole = {flag_name(name): plausible(command.hints[name], here) for name in required}
    found = []
    for name, hint in command.hints.items():
        kind = type_text(hint)
        if kind not in ("INT", "NUMBER"):
            continue
        tried = [(text, False) for text in ("-1", "nan", "inf", "-inf", "1e400")]
        tried += [(str(10**20), False)] if kind == "INT" else []
        if name == "seed":
            tried += [(str(2**32 - 1), True), (str(2**32), False)]
        if name == "temperature":
            tried += [("1", True), ("1e30", False)]
        for text, valid in tried:
            values = whole | {flag_name(name): text}
            found.append(("in range" if valid else "out of range", [f"{f}={v}" for f, v in values.items()]))
    return found


def cases(command: Command, here: str) -> dict[str, list[str]]:
    """{row of the table: words after the command}."""
    parameters = command.parameters
    required = [name for name, spec in parameters.items() if spec.default is inspect.Parameter.empty]
    whole = {flag_name(name): plausible(command.hints[name], here) for name in required}

    def words(**changes: str) -> list[str]:
        renamed = {flag_name(name): text for name, text in changes.items()}
        return [f"{flag}={text}" for flag, text in (whole | renamed).items()]

    longest = max(flags_of(command), key=len)
    shortened = [word for word in words() if not word.startswith(f"{longest}=")]
    table = {
        "unknown flag": [*words(), "--bogus-flag", "1"],
        "abbreviated flag": [*shortened, f"{longest[:-1]}=1"],
        "repeated flag": [*words(), "--config", "x", "--config", "x"],
        "missing value": [*words(), "--config"],
        "extra word": [*words(), "surplus", "surplus", "surplus"],
        "help first": ["--help", *words()],
        "help last": [*words(), "--help"],
        "help amid nonsense": ["--bogus", "--help", "two"],
    }
    if command.rest is None:  # otherwise the command hands them on
        table["after --"] = [*words(), "--", "--bogus"]
    for name in parameters:
        if is_int(command.hints[name]):
            table["wrong type"] = words(**{name: "two"})
    if switches := [name for name in parameters if command.hints[name] is bool]:
        table["false is false"] = words(**dict.fromkeys(switches, "false"))
    if required:
        table["no arguments"] = []
    for name in required:
        if "_existing" in repr(command.hints[name]):
            table["no such path"] = words(**{name: "/nowhere/at/all"})
    return table


def attempt(tool: Tool, words: list[str], ran: list[dict[str, Any]]) -> dict[str, Any]:
    """Run a command line; what it printed, how it ended and whether the command was called."""
    ran.clear()
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            tool.run(words)
        except SystemExit as end:
            code = end.code
    flags = [value for options in ran for value in options.values() if isinstance(value, bool)]
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "ran": bool(ran), "flags": flags}


def main(name: str, here: str) -> None:
    tool: Tool = importlib.import_module(f"tools.{name}.cli").tool
    ran: list[dict[str, Any]] = []
    rows = []
    for label, command in list(tool.commands.items()):

        def note(**options: Any) -> None:
            ran.append(options)

        note.__doc__ = command.function.__doc__
        tool.commands[label] = dataclasses.replace(command, function=note, groups={})
        for row, words in [*cases(command, here).items(), *numbers(command, here)]:
            rows.append({"command": label, "row": row, "words": words, **attempt(tool, [label, *words], ran)})
        prose, arguments = documentation(command)
        required = [p for p in command.parameters.values() if p.default is inspect.Parameter.empty]
        rows.append(
            {
                "command": label,
                "row": "documented",
                "required": len(required),
                "undocumented": sorted(set(command.parameters) - set(arguments)),
                "summary": prose[0] if prose else "",
            }
        )
    print(json.dumps({"rows": rows, "heavy": sorted(HEAVY & set(sys.modules))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
