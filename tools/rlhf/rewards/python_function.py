"""Rewards from a Python function."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.errors import Interrupted, StageError, UserError
from tools.rlhf.data import Prompt
from tools.rlhf.rewards.time_limit import StopAsked, TimeLimit, call_within
from tools.rlhf.rollout.rollout import Reply


class FunctionReward:
    """The `Scorer` of `def f(prompts: list[str], completions: list[str], **columns) -> list[float | None]`.

    It is called by keywords, with those of the arguments that it takes; it may be async. None is no opinion.
    """

    def __init__(self, path: Path, function: str, *, seconds: float = math.inf) -> None:
        """Load the file; `seconds` is the limit for that and for each call."""
        self._where, self._seconds = f"--reward py:{path}:{function}", seconds
        try:
            module = call_within(lambda: _load(path), seconds, where=f"loading {self._where}")
        except TimeLimit as error:
            raise UserError(f"{error} (--reward-timeout)") from None
        except StopAsked as error:
            raise Interrupted(f"{error}; run the same command again") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too: with code 0 the run would end as if it were done
            raise UserError(f"{self._where}: the file does not load: {type(error).__name__}: {error}") from error
        found = getattr(module, function, None)
        if not callable(found):
            others = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UserError(f"{self._where}: no such function; the file has: {', '.join(others) or 'none'}")
        self._function = found

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError if the function wants an argument that it will not get."""
        given = ("prompts", "completions", *prompts[0].columns)
        for parameter in _parameters(self._function):
            optional = parameter.default is not parameter.empty or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if optional:
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise UserError(f"{self._where} takes {parameter.name!r} by position only; arguments are given by name")
            if parameter.name not in given:
                raise UserError(
                    f"{self._where} wants an argument {parameter.name!r}; it gets {', '.join(given)} (the columns of "
                    "--prompts after the first two)"
                )

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        """One number per reply; NaN where the function gave None."""
        arguments: dict[str, Any] = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": [reply.text for reply in replies],
            **{name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns},
        }
        parameters = _parameters(self._function)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            names = {parameter.name for parameter in parameters}
            arguments = {name: value for name, value in arguments.items() if name in names}

        def answered() -> list[Any]:
            answer = self._function(**arguments)
            answer = asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer
            if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | dict):
                raise TypeError(f"it gave {type(answer).__name__}, not one number for each completion")
            return [None if value is None else _number(value) for value in answer]

        try:
            scores = call_within(answered, self._seconds, where=self._where)
        except TimeLimit as error:
            raise StageError(f"{error} (--reward-timeout); nothing is published") from None
        except StopAsked as error:
            raise Interrupted(f"{error}; run the same command to resume from the last saved state") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise StageError(f"{self._where} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(replies):
            raise StageError(f"{self._where} gave {len(scores)} rewards for {len(replies)} completions")
        for value in scores:
            if value is not None and not math.isfinite(value):
                raise StageError(f"{self._where} gave {value}; a reward is a finite number, or None for no opinion")
        return [math.nan if value is None else value for value in scores]


def _load(path: Path) -> ModuleType:
    """Execute the file as a module of `sys.modules`, as pickle and dataclasses need, with its folder on `sys.path`.

    Its own name is kept if no other module has it: a process pool that starts afresh imports the file by its name.
    """
    path = path.resolve()
    name, folder = path.stem, str(path.parent)
    known = sys.modules.get(name)
    if not name.isidentifier():
        taken = True
    elif known is not None:
        taken = getattr(known, "__file__", None) != str(path)
    else:
        taken = importlib.util.find_spec(name) is not None
    name = f"reward_file_{abs(hash(path)):x}" if taken else name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, folder)  # modules beside the file come first in its imports, as in a script's ...
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # ... and last in later ones, of libraries
    return module


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled: it gets everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


async def _awaited[T](answer: Awaitable[T]) -> T:
    return await answer


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
