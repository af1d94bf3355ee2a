"""The command lines of all tools as text; `make command-line` records them in tests/golden/command_line.txt.

The file changes, visibly for a reviewer, with every new or removed flag, type, default, or part in the run's fingerprint.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests/golden/command_line.txt"
TOOLS = ("convert", "pretrain", "sft", "rlhf", "infer")
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from shared.cli import Command, Tool  # noqa: E402
from shared.help import flag_name, type_text  # noqa: E402


def surface() -> str:
    """Every command of every tool, and a line for each of its flags."""
    tools = [importlib.import_module(f"tools.{name}.cli").tool for name in TOOLS]
    return "\n".join(line for tool in tools for command in tool.commands.values() for line in described(tool, command))


def described(tool: Tool, command: Command) -> list[str]:
    """A command and its flags: type, constraints, default, and whether it is left out of the run's fingerprint."""
    words = "".join(f" [{name.upper()}]" for name in command.positional)
    lines = [f"{tool.name} {command.name}{words}"]
    for name, parameter in command.parameters.items():
        default = "required" if parameter.default is inspect.Parameter.empty else f"= {parameter.default!r}"
        kind = " ".join([type_text(command.hints[name]), *constraints(command.hints[name])])
        outside = ", not in the fingerprint" if name in command.not_fingerprinted else ""
        outside += ", in the fingerprint unless at its default" if name in command.added else ""
        lines.append(f"  {flag_name(name)} {kind} {default}{outside}")
    rest = [f"  -- {command.rest}"] if command.rest else []
    return [*lines, *rest, ""]


def constraints(hint: Any) -> list[str]:
    """The checks of an annotation, wherever it nests: `gt=0`, or the name of the function that checks."""
    found: list[str] = []
    arguments = get_args(hint)
    if get_origin(hint) is Annotated:
        hint, *further = arguments
        for item in further:
            for check in item.metadata if isinstance(item, FieldInfo) else [item]:
                names = getattr(check, "__slots__", None) or vars(check)
                values = {name: getattr(check, name) for name in names}
                function = values.get("func")
                found += [function.__name__.strip("_")] if function else [f"{n}={v}" for n, v in values.items()]
        return found + constraints(hint)
    return [text for argument in arguments for text in constraints(argument)]


if __name__ == "__main__":
    SNAPSHOT.write_text(surface(), encoding="utf-8")
