"""Rewards from a Python function."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from shared.errors import StageError, UserError
from tools.rlhf.data import Prompt
from tools.rlhf.rollout.rollout import Reply


class FunctionReward:
    """The `Scorer` of `def f(prompts: list[str], completions: list[str], **columns) -> list[float]`."""

    def __init__(self, path: Path, function: str) -> None:
        self._where = f"--reward py:{path}:{function}"
        spec = importlib.util.spec_from_file_location(f"baton_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{self._where}: {path} is not a Python file (.py)")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too: with code 0 the run would end as if it were done
            raise UserError(f"{self._where}: the file does not load: {type(error).__name__}: {error}") from error
        found = getattr(module, function, None)
        if not callable(found):
            others = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UserError(f"{self._where}: no such function; the file has: {', '.join(others) or 'none'}")
        self._function = found

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]:
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
        texts = [prompt.text for prompt in prompts]
        try:
            answer = self._function(texts, [reply.text for reply in replies], **columns)
            scores = [float(value) for value in answer]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise StageError(f"{self._where} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(replies):
            raise StageError(f"{self._where} gave {len(scores)} rewards for {len(replies)} completions")
        for value in scores:
            if not math.isfinite(value):
                raise StageError(f"{self._where} gave {value}; every reward is a finite number")
        return scores
