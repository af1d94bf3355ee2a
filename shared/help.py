"""Help texts, from the commands' signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from shared.cli import Command, Tool

_WIDTH = 100


def flag_name(parameter: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return "--" + parameter.replace("_", "-")


def tool_help(tool: Tool) -> str:
    """Text of `TOOL --help`."""
    width = max(map(len, tool.commands))
    rows = [f"  {name:{width}}  {summary(command)}" for name, command in tool.commands.items()]
    head = f"{tool.name} {tool.version}: {tool.summary}\n\nUsage: {tool.name} COMMAND --flag value ...\n\nCommands:"
    tail = f"\n`{tool.name} COMMAND --help` says what a command reads, writes and takes."
    return "\n".join([head, *rows, tail])


def command_help(tool: Tool, command: Command) -> str:
    """Text of `TOOL COMMAND --help`."""
    prose, arguments = documentation(command)
    usage = [f"Usage: {tool.name} {command.name}"]
    usage += [f"[{name.upper()}]" for name in command.positional]
    lines = [
        " ".join([*usage, *_required(command), "[--flag value ...]", *(["[-- ...]"] if command.rest else [])]),
        "",
        *(textwrap.fill(paragraph, _WIDTH) + "\n" for paragraph in prose),
        "Flags:",
    ]
    for name, parameter in command.parameters.items():
        hint = type_text(command.hints[name])
        if parameter.default is inspect.Parameter.empty:
            note = "required"
        elif parameter.default is None or parameter.default in ([], ()):
            note = "optional"
        else:
            note = f"default {_default_text(parameter.default)}"
        lines.append(f"  {flag_name(name)} {hint}  ({note})")
        lines.append(
            textwrap.fill(arguments.get(name, ""), _WIDTH, initial_indent="      ", subsequent_indent="      ")
        )
    lines.append("  --config FILE  (optional)")
    lines.append("      a YAML mapping of any of these flags; flags on the command line win.")
    if command.rest:
        lines.append("  -- ...  (optional)")
        lines.append(
            textwrap.fill(arguments[command.rest], _WIDTH, initial_indent="      ", subsequent_indent="      ")
        )
    return "\n".join(lines)


def summary(command: Command) -> str:
    """The first line of the command's docstring."""
    return (inspect.getdoc(command.function) or "").partition("\n")[0]


def documentation(command: Command) -> tuple[list[str], dict[str, str]]:
    """Paragraphs of the function's docstring, and descriptions of its parameters, {parameter: text}.

    Descriptions come from the function's `Args:` first, then from the `Attributes:` of its dataclasses, derived classes
    before their bases.
    """
    body, _, section = (inspect.getdoc(command.function) or "").partition("\nArgs:\n")
    arguments: dict[str, str] = {}
    for group in command.groups.values():
        for kind in reversed(group.__mro__):
            arguments |= _entries((inspect.cleandoc(kind.__doc__ or "")).partition("\nAttributes:\n")[2])
    paragraphs = [" ".join(paragraph.split()) for paragraph in body.split("\n\n") if paragraph.strip()]
    return paragraphs, arguments | _entries(section)


def _entries(section: str) -> dict[str, str]:
    """Parse `    name: text`, continued on indented lines, to {name: text}."""
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            entries[name] = entry[2]
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return entries


def _required(command: Command) -> list[str]:
    empty = inspect.Parameter.empty
    wanted = [n for n, p in command.parameters.items() if p.default is empty and n not in command.positional]
    return [f"{flag_name(name)} {type_text(command.hints[name])}" for name in wanted]


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def type_text(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return type_text(typing.get_args(hint)[0])
    if origin is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if origin in (typing.Union, UnionType):
        return "|".join(dict.fromkeys(type_text(arg) for arg in typing.get_args(hint) if arg is not NoneType))
    if origin in (list, tuple):
        return f"{type_text(typing.get_args(hint)[0])},..."
    if hint is bool:
        return "true|false"
    return {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(hint, getattr(hint, "__name__", str(hint)))
