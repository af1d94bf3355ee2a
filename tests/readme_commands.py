"""Check command lines of one tool without running them: `python readme_commands.py TOOL FOLDER`, lines on stdin.

A line passes if the tool's parser accepts it. Paths that must exist are replaced by existing ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import sys
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from shared.cli import Command, Tool
from shared.help import flag_name


def with_existing_paths(command: Command, words: list[str], here: str) -> list[str]:
    """The words with every value that must name an existing path replaced by one."""
    replaced: list[str] = []
    pending = ""
    for word in words:
        name, equals, _ = word.partition("=")
        parameter = name.removeprefix("--").replace("-", "_")
        hint = repr(command.hints.get(parameter, "")) if name.startswith("--") else ""
        path = f"{here}/file.jsonl" if "_existing_file" in hint else here
        if pending:
            word = pending
        elif "_existing" in hint and equals:
            word = f"{flag_name(parameter)}={path}"
        elif not name.startswith("--"):
            word = here  # a positional path
        takes_value = name.startswith("--") and not equals and command.hints.get(parameter) is not bool
        pending = (path if "_existing" in hint else "\0") if takes_value else ""
        replaced.append(word)
    return replaced


def main(name: str, here: str) -> None:
    tool: Tool = importlib.import_module(f"tools.{name}.cli").tool
    for label, command in list(tool.commands.items()):

        def accept(**options: Any) -> None:
            return None

        tool.commands[label] = dataclasses.replace(command, function=accept, groups={})
    answers = []
    for line in sys.stdin.read().splitlines():
        _, label, *words = shlex.split(line, comments=True)
        command = tool.commands.get(label)
        given = with_existing_paths(command, words, here) if command else words
        given = [original if new == "\0" else new for original, new in zip(words, given, strict=True)]
        errors = StringIO()
        code: Any = None
        with redirect_stderr(errors):
            try:
                tool.run([label, *given])
            except SystemExit as end:
                code = end.code
        answers.append([code, errors.getvalue()])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
