"""The running command and its options, for manifests and for the run's fingerprint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NEVER_FINGERPRINTED = {"overwrite", "target"}


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """A command with the value of every option, defaults included."""

    tool: str
    command: str
    version: str
    options: dict[str, Any]  # JSON values; paths as text
    not_fingerprinted: tuple[str, ...] = ()
    # Options that earlier versions did not have -> defaults: at its default such an option is not fingerprinted, so a run of
    # an earlier version is the same run.
    added: dict[str, Any] = field(default_factory=dict)

    def fingerprinted_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The options in the run's fingerprint. Inputs are left out: they are fingerprinted by content, not by path."""
        return {
            name: value
            for name, value in self.compared_options(inputs).items()
            if name not in self.added or value != self.added[name]
        }

    def compared_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with added options at their defaults."""
        ignored = {*_NEVER_FINGERPRINTED, *self.not_fingerprinted, *inputs}
        return {name: value for name, value in self.options.items() if name not in ignored}


_current: ContextVar[Invocation] = ContextVar("invocation")


def invocation() -> Invocation:
    """The running command. LookupError outside of one: wrap direct calls in `invoked`."""
    return _current.get()


@contextlib.contextmanager
def invoked(
    tool: str,
    command: str,
    options: Mapping[str, Any],
    *,
    version: str = "0",
    not_fingerprinted: Sequence[str] = (),
    added: Mapping[str, Any] | None = None,
) -> Iterator[Invocation]:
    """Context manager: declare the running command."""
    current = Invocation(
        tool=tool,
        command=command,
        version=version,
        options={name: _plain(value) for name, value in options.items()},
        not_fingerprinted=tuple(not_fingerprinted),
        added=_plain(added or {}),
    )
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
