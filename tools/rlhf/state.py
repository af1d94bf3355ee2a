"""State of an unfinished run: `TARGET.state` beside the target, from the first save until the target is published.

TARGET.state/run.json          fingerprint of the command, so that no other command resumes it
TARGET.state/metrics.jsonl     one line per iteration
TARGET.state/step_0000020/     what the loop saved; complete, since it is renamed when it is
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.directory.manifest import Inputs, parents_of, run_fingerprint
from shared.checkpoint.directory.target import RUN, recorded_fingerprint
from shared.checkpoint.files import commit_directory, remove_tree, write_atomically
from shared.console import log
from shared.errors import UserError
from shared.invocation import invocation

_PARTIAL = ".partial"


class State:
    """The state directory of one run. Rank 0 creates, commits and removes; every rank writes into `begin`'s directory."""

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint

    @classmethod
    def open(cls, target: Path, inputs: Inputs, *, overwrite: bool) -> Self:
        """The state of this command's run to `target`: none yet, or as an interrupted run left it. Writes nothing.

        Call it inside `publish`, whose lock keeps other processes away from target and state.

        Raises:
            UserError: it is of another command, and --overwrite was not given.
        """
        path = target.with_name(f"{target.name}.state")
        state = cls(path, fingerprint=run_fingerprint(invocation(), inputs, parents_of(inputs)))
        if path.exists() and not state._is_resumable() and not overwrite:
            raise UserError(
                f"{path} holds the state of an unfinished run with other inputs or options; "
                "run that command again to finish it, or use --overwrite to drop it"
            )
        return state

    def _is_resumable(self) -> bool:
        return recorded_fingerprint(self.path) == self._fingerprint

    def create(self) -> int | None:
        """Make the directory, remove what cannot be resumed. Call it once the user's input is checked.

        Returns:
            the step to resume from, None for a new run.
        """
        if self.path.exists() and not self._is_resumable():
            remove_tree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / RUN, (json.dumps({"identity": self._fingerprint}) + "\n").encode())
        for leftover in self.path.glob(f"*{_PARTIAL}"):
            remove_tree(leftover)
        return max((int(path.name.removeprefix("step_")) for path in self.path.glob("step_*")), default=None)

    def step_path(self, step: int) -> Path:
        """The directory of a committed step."""
        return self.path / f"step_{step:07d}"

    def begin(self, step: int) -> Path:
        """The directory to write a step into, the same on every rank; not made yet."""
        return self.step_path(step).with_suffix(_PARTIAL)

    def commit(self, step: int, facts: dict[str, Any]) -> None:
        """Make the step just written the one to resume from, with `facts` (JSON values); remove older steps."""
        partial = self.begin(step)
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        commit_directory(partial, self.step_path(step))
        for older in sorted(self.path.glob("step_*"))[:-1]:
            remove_tree(older)
        log(f"saved the state of step {step} in {self.path}")

    def facts(self, step: int) -> dict[str, Any]:
        """The facts that `commit` was given."""
        return json.loads((self.step_path(step) / "facts.json").read_text(encoding="utf-8"))

    def remove(self) -> None:
        """Remove the state: the target is published."""
        remove_tree(self.path)
