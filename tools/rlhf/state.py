"""State of an unfinished run: `TARGET.state`, from the first save until the target is published.

TARGET.state/run.json          fingerprint of the command; only the same command resumes
TARGET.state/metrics.jsonl     one line per iteration; beside it the folders of trackers
TARGET.state/step_0000020/     a checkpoint of the loop; complete, because it is renamed last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from shared.checkpoint.directory.manifest import Inputs, parents_of, run_fingerprint
from shared.checkpoint.directory.target import RUN, recorded_fingerprint
from shared.checkpoint.files import commit_directory, remove_tree, write_atomically
from shared.console import log
from shared.errors import UserError
from shared.invocation import invocation
from shared.report.metrics import Metrics
from shared.report.track import Track

_PARTIAL = ".partial"


class State:
    """The state directory of one run. Rank 0 creates, commits and removes it; every rank writes to the path of `begin`."""

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint

    @classmethod
    def open(cls, target: Path, inputs: Inputs, *, overwrite: bool) -> Self:
        """The state of this command's run: new, or that of an interrupted run. Writes nothing.

        Call it inside `publish`, whose lock covers target and state.

        Raises:
            UserError: the state is another command's, and --overwrite is not given.
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
        """Create the directory, remove a state that cannot be resumed. Call it after all checks of the user's input.

        Returns:
            the step to resume from; None for a new run.
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
        """The directory for a new step, the same on every rank; not created yet."""
        return self.step_path(step).with_suffix(_PARTIAL)

    def commit(self, step: int, facts: dict[str, Any]) -> None:
        """Make the written step the one to resume from, with `facts` (JSON values). Removes older steps."""
        partial = self.begin(step)
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        commit_directory(partial, self.step_path(step))
        for older in sorted(self.path.glob("step_*"))[:-1]:
            remove_tree(older)
        log(f"saved the state of step {step} in {self.path}")

    def facts(self, step: int) -> dict[str, Any]:
        """The `facts` of `commit`."""
        return json.loads((self.step_path(step) / "facts.json").read_text(encoding="utf-8"))

    def metrics(self, resumed_step: int | None, track: Sequence[Track]) -> Metrics:
        """The metrics of the run, for the trackers under the target's name; on rank 0 only."""
        return Metrics(self.path, resumed_step=resumed_step, track=track, name=self.path.stem)

    def remove(self) -> None:
        """Remove the state after publication."""
        remove_tree(self.path)
