"""The run of a training command: the target to publish and the state to resume from."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.checkpoint.directory.manifest import Inputs
from shared.checkpoint.directory.model_card import Stage, write_adapter_card, write_card
from shared.checkpoint.directory.publish import Publication, publish
from shared.errors import StageError
from shared.invocation import invocation
from shared.report import page
from shared.report.metrics import METRICS, read
from shared.report.track import FOLDERS
from shared.runtime import progress
from shared.runtime.agreement import on_rank_0
from tools.rlhf.engines.deepspeed import USE_DEEPSPEED
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.options import PolicyOptions, PreferenceOptions
from tools.rlhf.state import State


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """An open run: the directory to publish and the state to resume from."""

    out: Publication | None
    """The publication in progress; on rank 0 only."""
    state: State

    def add_report(
        self, *, title: str, facts: Mapping[str, Any], charts: Mapping[str, Sequence[str]], figures: Sequence[str] = ()
    ) -> None:
        """Put the run's metrics.jsonl, report.html and folders of trackers into the directory to publish; rank 0 only.

        Args:
            title: heading.
            facts: name -> value, shown as a list.
            charts: chart title -> metric names.
            figures: further ones, after the charts.
        """
        assert self.out is not None, "rank 0 has the directory in the making"
        metrics = self.state.path / METRICS
        (self.out.path / METRICS).write_bytes(metrics.read_bytes())
        for folder in FOLDERS:
            if (self.state.path / folder).is_dir():
                shutil.copytree(self.state.path / folder, self.out.path / folder, ignore=_links)
        tiles = {name.replace("_", " "): shown(value) for name, value in facts.items()}
        page.write(
            self.out.path / page.REPORT,
            page.render(title=title, tiles=tiles, figures=[*page.line_charts(read(metrics), charts), *figures]),
        )


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_symlink()]


def shown(value: Any) -> str:
    """A fact, formatted for the report."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def open_training(options: PreferenceOptions | PolicyOptions, distributed: DistributedContext) -> Iterator[RunContext]:
    """As `open_run`, for a command's options; ranks of several are watched. UserError if they do not fit processes or device."""
    options.check(distributed.world_size)
    options.check_device(distributed.device.type)
    told = os.environ.get(USE_DEEPSPEED)
    if distributed.world_size > 1:  # one alone holds nobody up; a first roll-out may take any time
        progress.begin(options.hang_timeout, first_update=math.inf)
    try:
        progress.at("reading and loading", long=True, limit=math.inf)
        with open_run(
            options.target, options.inputs, overwrite=options.overwrite, kind=options.published_kind
        ) as context:
            yield context
    finally:
        progress.end()
        os.environ.pop(USE_DEEPSPEED, None)  # a run of this process without ZeRO may follow
        if told is not None:
            os.environ[USE_DEEPSPEED] = told


@contextmanager
def open_run(
    target: Path, inputs: Inputs, *, overwrite: bool, kind: Literal["hf", "adapter"] = "hf"
) -> Iterator[RunContext]:
    """Open `target` and its state. When the block succeeds: write the model card, publish, then remove the state.

    Rank 0 does the checks. If one fails, the other ranks exit silently with rank 0's exit code.

    Raises:
        StageError: the block ended with `sys.exit(0)`, which would look like a run that is done.
    """
    out: Publication | None = None
    with ExitStack() as stack:

        def open_target() -> None:
            nonlocal out
            out = stack.enter_context(publish(target, kind=kind, inputs=inputs, overwrite=overwrite))
            State.open(target, inputs, overwrite=overwrite)

        on_rank_0(open_target)
        state = State.open(target, inputs, overwrite=True)  # rank 0 has checked it
        try:
            yield RunContext(out=out, state=state)
        except SystemExit as end:
            if end.code:
                raise
            raise StageError("something in the run called sys.exit() before the end; nothing is published") from end
        if out is not None:
            stage = Stage.of_this(invocation(), inputs, out.facts)
            if kind == "hf":
                write_card(out.path, stage, name=target.name)
            else:
                base = inputs["source"]
                assert isinstance(base, Path)
                link = os.path.relpath(base.resolve(), target.resolve())
                write_adapter_card(out.path, stage, name=target.name, base=base, link=link)
    if out is not None:
        state.remove()
