"""Strict command lines on top of fire: a mistyped flag never starts work.

fire alone runs the function before it rejects an unknown flag, ignores annotations, and reads `--flag=false` as true.
Here three steps run before any heavy import: the words are checked against the command's signature; fire binds them to
a function that records them; pydantic validates each value against its annotation. Then the command runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import math
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from types import FrameType, NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn

import fire
import yaml
from fire.decorators import SetParseFn
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from shared.console import log, progress
from shared.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AlreadyDone,
    Interrupted,
    StageError,
    UserError,
)
from shared.foreign_formats import absent, not_a_directory
from shared.help import command_help, flag_name, tool_help
from shared.invocation import Invocation, invocation, invoked

__all__ = [
    "Existing",
    "ExistingDir",
    "ExistingFile",
    "Invocation",
    "NonNegative",
    "Positive",
    "Seed",
    "Tool",
    "invocation",
    "invoked",
    "log",
    "nearest",
    "progress",
]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(absent(path))
    return path


def _existing_dir(path: Path) -> Path:
    if not _existing(path).is_dir():
        raise ValueError(not_a_directory(path))
    return path


def _existing_file(path: Path) -> Path:
    if not _existing(path).is_file():
        raise ValueError("is a directory, a file is required")
    return path


Existing = Annotated[Path, AfterValidator(_existing)]
ExistingDir = Annotated[Path, AfterValidator(_existing_dir)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
_LARGEST = 2**31 - 1  # counts and sizes reach C integers of torch and numpy
Positive = Annotated[int, Field(gt=0, le=_LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=_LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy's range

_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a tool: a typed function; its docstring is the help.

    Every parameter is a flag. A parameter annotated with a dataclass is one flag per field.
    """

    name: str
    function: Callable[..., int | None]
    positional: tuple[str, ...]  # parameters also accepted as bare words, in order
    not_fingerprinted: tuple[str, ...]  # parameters outside the run's fingerprint
    added: tuple[str, ...]  # parameters outside it at their default
    parameters: dict[str, inspect.Parameter] = field(repr=False)
    hints: dict[str, Any] = field(repr=False)
    groups: dict[str, type] = field(repr=False)  # parameters annotated with a dataclass
    rest: str | None = None  # the parameter of the words after `--`; no flag

    def call(self, arguments: Mapping[str, Any]) -> int | None:
        """Run the function with one value per flag."""
        single, grouped = dict(arguments), {}
        for name, kind in self.groups.items():
            grouped[name] = kind(**{item.name: single.pop(item.name) for item in dataclasses.fields(kind)})
        return self.function(**single, **grouped)


def _flags(function: Callable[..., int | None], rest: str | None) -> dict[str, dict[str, Any]]:
    """`parameters`, `hints` and `groups` of a `Command`."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    groups: dict[str, type] = {}
    annotations = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == rest:
            continue
        kind = annotations[name]
        if not dataclasses.is_dataclass(kind):
            parameters[name], hints[name] = parameter, kind
            continue
        assert isinstance(kind, type)
        groups[name] = kind
        hints |= typing.get_type_hints(kind, include_extras=True)
        for item in dataclasses.fields(kind):
            default = inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default
            parameters[item.name] = inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return {"parameters": parameters, "hints": hints, "groups": groups}


class Tool:
    """A console script: `tool COMMAND --flag value ...`."""

    def __init__(self, name: str, summary: str) -> None:
        self.name = name
        self.summary = summary
        self.commands: dict[str, Command] = {}

    @property
    def version(self) -> str:
        """The version of the installed distribution (pyproject.toml)."""
        return metadata.version(f"baton-{self.name}")

    def command(
        self,
        function: Callable[..., int | None] | None = None,
        *,
        name: str | None = None,
        positional: Sequence[str] = (),
        not_fingerprinted: Sequence[str] = (),
        added: Sequence[str] = (),
        rest: str | None = None,
    ) -> Any:
        """Decorator, with or without arguments: register a function as a command.

        Args:
            function: the command; every parameter is annotated.
            name: its name on the command line; default: the function's, with hyphens.
            positional: parameters also accepted as bare words.
            not_fingerprinted: parameters that do not change the result, left out of the run's fingerprint.
            added: parameters that the first version did not have; at their default left out of the fingerprint, so a run or
                result of that version is still this one.
            rest: parameter that gets the words after `--`, unread; without it `--` is refused.
        """

        def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
            label = name or function.__name__.replace("_", "-")
            self.commands[label] = Command(
                name=label,
                function=function,
                positional=tuple(positional),
                not_fingerprinted=tuple(not_fingerprinted),
                added=tuple(added),
                rest=rest,
                **_flags(function, rest),
            )
            return function

        return register(function) if function is not None else register

    def run(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Parse, validate and run. Always ends the process, with a documented exit code."""
        argv = list(sys.argv[1:] if argv is None else argv)
        label = self.name
        try:
            if argv and argv[0] == "--version":
                _print_and_exit(self.version)
            command = self._select(argv)
            if command is None:
                _print_and_exit(tool_help(self))
            label = f"{self.name} {command.name}"
            words, rest = argv[1:], []
            if command.rest and "--" in words:
                end = words.index("--")
                words, rest = words[:end], words[end + 1 :]
            if {"--help", "-h"} & set(words):
                _print_and_exit(command_help(self, command))
            arguments = _validate(command, _bind(command, _words(command, words)))
            if command.rest:
                arguments[command.rest] = tuple(rest)
        except UserError as error:
            _print_error(label, str(error))
            raise SystemExit(EXIT_USAGE) from None
        except OSError as error:  # a path without read permission
            raise SystemExit(_os_error(label, error)) from None
        raise SystemExit(self._execute(label, command, arguments))

    def _select(self, argv: list[str]) -> Command | None:
        """The command named by the first word; None for the tool's help."""
        if not argv:
            raise UserError(f"no command given; one of: {', '.join(self.commands)} ({self.name} --help says more)")
        if argv[0] in ("--help", "-h"):
            return None
        if argv[0] not in self.commands:
            if {"--help", "-h"} & set(argv):
                return None
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], list(self.commands))}")
        return self.commands[argv[0]]

    def _execute(self, label: str, command: Command, arguments: dict[str, Any]) -> int:
        _install_signals()
        try:
            with invoked(
                self.name,
                command.name,
                arguments,
                version=self.version,
                not_fingerprinted=command.not_fingerprinted,
                added={name: command.parameters[name].default for name in command.added},
            ):
                return command.call(arguments) or EXIT_DONE
        except AlreadyDone as done:
            log(str(done))
            return EXIT_DONE
        except UserError as error:
            _print_error(label, str(error))
            return EXIT_USAGE
        except Interrupted as error:
            log(str(error))
            return EXIT_INTERRUPTED
        except StageError as error:
            _print_error(label, str(error))
            return EXIT_FAILED
        except KeyboardInterrupt:
            _print_error(label, "interrupted")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            _exit_on_closed_pipe()
            return EXIT_DONE
        except OSError as error:
            return _os_error(label, error)


def _print_and_exit(text: str) -> NoReturn:
    """Print to stdout and exit."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _exit_on_closed_pipe()
    raise SystemExit(EXIT_DONE)


def _exit_on_closed_pipe() -> None:
    """Redirect stdout to /dev/null after its reader has gone (`| head`): the interpreter's last flush would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _install_signals() -> None:
    """SIGTERM and SIGUSR1 exit with EXIT_INTERRUPTED. Training installs its own handlers.

    The defaults: PID 1 of a container ignores SIGTERM; SIGUSR1, Slurm's warning before the time limit, kills.
    """

    def exit_on_signal(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_INTERRUPTED)

    with contextlib.suppress(ValueError):  # outside the main thread, in tests
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, exit_on_signal)


def _os_error(label: str, error: OSError) -> int:
    """Report an OSError: one line if the cause is known, else a traceback. Returns the exit code."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        _print_error(label, f"{place}the disk is full; free some space and run the same command again")
        return EXIT_FAILED
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        uid = os.getuid()
        _print_error(
            label, f"{place}permission denied for uid {uid}; give a path this user may use, or change its owner"
        )
        return EXIT_USAGE
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        _print_error(label, f"{place}{os.strerror(error.errno).lower()}; give another path")
        return EXIT_USAGE
    if error.errno in (errno.EIO, errno.ESTALE):
        _print_error(label, f"{place}the disk failed: {os.strerror(error.errno).lower()}")
        return EXIT_FAILED
    traceback.print_exception(error)
    return EXIT_FAILED


def _print_error(label: str, message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = f" (rank {rank})" if rank != "0" else ""
    print(f"{label}: error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or the list of what is known where nothing is near: the end of an error about `word`."""
    close = get_close_matches(word, known, n=1, cutoff=0.4)
    prefixed = [k for k in known if k.startswith(word)] if len(word.lstrip("-")) > 1 else []
    best = prefixed[0] if prefixed else close[0] if close else None
    return f"; did you mean {best}?" if best else f"; known: {', '.join(known)}"


def _words(command: Command, words: list[str]) -> dict[str, str]:
    """The command line as {parameter: raw text}; UserError for words that do not fit the signature."""
    flags = {flag_name(p): p for p in command.parameters} | {"--config": "config"}
    given: dict[str, str] = {}
    bare: list[str] = []
    rest = iter(range(len(words)))
    for index in rest:
        word = words[index]
        if word == "--":
            raise UserError("'--' is not supported; remove it and what follows")
        if not word.startswith("-") or word == "-":
            bare.append(word)
            continue
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        negated = "--" + name[len("--no-") :] if name.startswith("--no-") else ""
        if name not in flags and negated in flags and _is_bool(command, flags[negated]):
            if equals:
                raise UserError(f"{name} takes no value")
            parameter, text = flags[negated], "false"
        elif name not in flags:
            raise UserError(f"unknown flag {word.partition('=')[0]}{nearest(name, list(flags))}")
        else:
            parameter = flags[name]
            if not equals and _is_bool(command, parameter):
                text = "true"
            elif not equals:
                following = words[index + 1] if index + 1 < len(words) else None
                if following is None or following.startswith("--"):
                    raise UserError(f"{name} needs a value")
                text = words[next(rest)]
            if text == "":
                raise UserError(f"{name} needs a value, it is empty")
        if parameter in given:
            raise UserError(f"{flag_name(parameter)} is given twice")
        given[parameter] = text
    for text, parameter in zip(bare, command.positional, strict=False):
        if parameter in given:
            raise UserError(f"{flag_name(parameter)} is given twice, as a flag and as the word {text!r}")
        given[parameter] = text
    if len(bare) > len(command.positional):
        extra = bare[len(command.positional)]
        raise UserError(f"unexpected word {extra!r}; every value follows its --flag")
    return given


def _bind(command: Command, given: dict[str, str]) -> dict[str, Any]:
    """Bind the words to parameters with fire, without running the command; add the values of --config."""
    bound: dict[str, str] = {}

    @SetParseFn(str)
    def binder(**values: str) -> None:
        bound.update(values)

    names = [
        inspect.Parameter(p, inspect.Parameter.KEYWORD_ONLY, default=None) for p in (*command.parameters, "config")
    ]
    binder.__signature__ = inspect.Signature(names)
    fire.Fire(binder, command=[f"--{name}={text}" for name, text in given.items()], name=command.name)
    values: dict[str, Any] = dict(bound)
    config = values.pop("config", None)
    return (_from_config(command, Path(config)) if config else {}) | values


def _from_config(command: Command, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a mapping of flags to values is required")
    known = list(command.parameters)
    values = {}
    for key, value in content.items():
        parameter = str(key).replace("-", "_")
        if parameter not in known:
            raise UserError(f"--config {path}: unknown key {key!r}{nearest(parameter, known)}")
        values[parameter] = value
    return values


def _validate(command: Command, given: dict[str, Any]) -> dict[str, Any]:
    """Convert and validate the values by their annotations; UserError names the flag."""
    missing = [
        flag_name(p)
        for p, spec in command.parameters.items()
        if spec.default is inspect.Parameter.empty and p not in given
    ]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given (see --help)")
    arguments = {}
    for name, spec in command.parameters.items():
        if name not in given:
            arguments[name] = spec.default
            continue
        raw = given[name]
        if isinstance(raw, str) and _is_bool(command, name):
            if raw.lower() not in _TRUE | _FALSE:
                raise UserError(f"{flag_name(name)}: {raw!r} is neither true nor false")
            raw = raw.lower() in _TRUE
        elif isinstance(raw, str) and _is_sequence(command.hints[name]):
            raw = [part for part in raw.split(",") if part]
        elif isinstance(raw, str):
            raw = _literal(command.hints[name], raw)
        try:
            arguments[name] = TypeAdapter(command.hints[name]).validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            text = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{flag_name(name)} {given[name]}: {text[0].lower()}{text[1:]}") from None
        if isinstance(arguments[name], float) and not math.isfinite(arguments[name]):
            raise UserError(f"{flag_name(name)} {given[name]}: a finite number is required")
    return arguments


def _members(hint: Any) -> list[Any]:
    """The alternatives of a union, without `Annotated` and `None`."""
    if typing.get_origin(hint) is Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return [m for arg in typing.get_args(hint) if arg is not NoneType for m in _members(arg)]
    return [hint]


def _literal(hint: Any, text: str) -> Any:
    """Convert text to a member of a `Literal[0, 1]`; pydantic compares literals without conversion."""
    spelt = [
        value for member in _members(hint) if typing.get_origin(member) is Literal for value in typing.get_args(member)
    ]
    return next((value for value in spelt if str(value) == text), text)


def _is_bool(command: Command, parameter: str) -> bool:
    return parameter != "config" and _members(command.hints[parameter]) == [bool]


def _is_sequence(hint: Any) -> bool:
    return any(typing.get_origin(member) in (list, tuple) for member in _members(hint))


def flags_of(command: Command) -> Iterator[str]:
    """Every flag of a command."""
    yield from (flag_name(parameter) for parameter in command.parameters)
    yield "--config"
