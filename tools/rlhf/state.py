"""State of an unfinished run: `TARGET.state` beside the target, there from the first save until the target is published.

TARGET.state/run.json          identity of the command, so that another command never resumes it
TARGET.state/metrics.jsonl     one line per iteration
TARGET.state/step_0000020/     what the loop saved: there whole or not at all
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.directory.manifest import Inputs, parents_of, run_fingerprint
from shared.checkpoint.files import remove_tree, sync, sync_tree, write_atomically
from shared.console import log
from shared.errors import UserError
from shared.invocation import invocation

RUN = "run.json"
_PARTIAL = ".partial"


class State:
    """The state directory of one run. Only rank 0 opens, commits and removes; every rank may write into `begin`'s."""

    def __init__(self, path: Path, *, same: str) -> None:
        self.path = path
        self._same = same

    @classmethod
    def open(cls, target: Path, inputs: Inputs, *, overwrite: bool) -> Self:
        """The state of this command's run to `target`: none yet, or as an interrupted run left it. Writes nothing.

        Call it while the target is held by `publish`, which keeps a second process away from both.

        Raises:
            UserError: an unfinished run of another command is there, and --overwrite was not given.
        """
        state = cls(
            target.with_name(f"{target.name}.state"), same=run_fingerprint(invocation(), inputs, parents_of(inputs))
        )
        if state.path.exists() and not state._is_ours() and not overwrite:
            raise UserError(
                f"{state.path} holds the state of an unfinished run with other inputs or options; "
                "run that command again to finish it, or use --overwrite to drop it"
            )
        return state

    def _is_ours(self) -> bool:
        try:
            return bool(json.loads((self.path / RUN).read_text(encoding="utf-8"))["identity"] == self._same)
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def create(self) -> int | None:
        """Make the directory, or remove what is not to be resumed; call it once the user's input is checked.

        Returns:
            the step to resume from, None for a new run.
        """
        if self.path.exists() and not self._is_ours():
            remove_tree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / RUN, (json.dumps({"identity": self._same}) + "\n").encode())
        for leftover in self.path.glob(f"*{_PARTIAL}"):
            remove_tree(leftover)
        return max((int(path.name.removeprefix("step_")) for path in self.path.glob("step_*")), default=None)

    def of_step(self, step: int) -> Path:
        """Where a step's state lies."""
        return self.path / f"step_{step:07d}"

    def begin(self, step: int) -> Path:
        """The directory to write a step's state into; not made yet."""
        return self.of_step(step).with_suffix(_PARTIAL)

    def commit(self, step: int, facts: dict[str, Any]) -> None:
        """Make the step just written the state to resume from, with `facts` (JSON values); drop older ones."""
        partial = self.begin(step)
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        sync_tree(partial)
        partial.rename(self.of_step(step))
        sync(self.path)
        for older in sorted(self.path.glob("step_*"))[:-1]:
            remove_tree(older)
        log(f"saved the state of step {step} in {self.path}")

    def facts(self, step: int) -> dict[str, Any]:
        """What `commit` was given."""
        return json.loads((self.of_step(step) / "facts.json").read_text(encoding="utf-8"))

    def remove(self) -> None:
        """The target is published: nothing is left to resume."""
        remove_tree(self.path)
