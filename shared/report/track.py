"""Trackers: the scalars of a run for TensorBoard, Weights & Biases, MLflow and Trackio.

metrics.jsonl and report.html are written without them. Nothing leaves the machine unless the tracker's own environment variable
says so: WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID. Otherwise a tracker writes to a folder of the run directory.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from shared.console import log
from shared.errors import UserError

Track = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]  # names of packages on PyPI, too
DEFAULT: tuple[Track, ...] = ("tensorboard",)
FOLDERS = ("tensorboard", "wandb", "mlruns", "trackio")  # of the run directory
_PROJECT = "baton"


class Tracker(Protocol):
    """One place that scalars go to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The scalars of an update or a validation. Several calls may have the same step."""

    def flush(self) -> None:
        """Write what is buffered."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, directory: Path, name: str, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events from purge_step on, written by the interrupted run.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=(resumed_step or 0) + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            self._writer.add_scalar(metric, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in `wandb/`, for `wandb sync`; with WANDB_MODE=online on its server.

    A resumed run has the same id. Updates that it repeats are there twice: a run on the server cannot be cut.
    """

    def __init__(self, directory: Path, name: str, resumed_step: int | None) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=_identifier(directory / "wandb", resumed_step),
            resume="allow",
            dir=str(directory),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
        )
        # wandb's own step never goes back, and has one call: `step` is a metric, and the axis of the others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """wandb's own process writes."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow in `mlruns/`, for `mlflow ui`; with MLFLOW_TRACKING_URI on that server.

    A resumed run has the same id. Updates that it repeats are there twice: MLflow keeps every value.
    """

    def __init__(self, directory: Path, name: str, resumed_step: int | None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse a folder without it
        mlflow = import_module("mlflow")
        self._metric = import_module("mlflow.entities").Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (directory / "mlruns").resolve().as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(title)
        place = self._client.create_experiment(title) if experiment is None else experiment.experiment_id
        identifier = _identifier(directory / "mlruns", resumed_step)
        found = self._client.search_runs([place], filter_string=f"tags.baton = '{identifier}'")
        run = found[0] if found else self._client.create_run(place, run_name=name, tags={"baton": identifier})
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(re.sub(r"[^\w\-. /]", "_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def flush(self) -> None:
        """Every call writes."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of Trackio in `trackio/`, for `trackio show`; with TRACKIO_SPACE_ID in that Space."""

    def __init__(self, directory: Path, name: str, resumed_step: int | None) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((directory / "trackio").resolve()))  # read when it is imported
        trackio = import_module("trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{name}-{_identifier(directory / 'trackio', resumed_step)}",
            resume="allow",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Trackio's own thread writes."""

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, str, int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_installed(names: Sequence[Track]) -> None:
    """UserError if a tracker's package is missing. Imports none of them."""
    if "none" in names and len(names) > 1:
        raise UserError(f"--track {','.join(names)}: none stands alone")
    for name in names:
        if name != "none" and find_spec(name) is None:
            raise UserError(
                f"--track {name} needs a package that is not installed: run `pip --python {sys.executable} install {name}`"
            )


class Trackers:
    """All trackers of a run. One that fails is left out from then on, with a line in the log: the training goes on."""

    def __init__(self, names: Sequence[Track], directory: Path, *, name: str, resumed_step: int | None) -> None:
        """
        Args:
            names: of `--track`.
            directory: of the run.
            name: of the run.
            resumed_step: the last step that is kept; None: a new run.
        """
        self._open: dict[str, Tracker] = {}
        for each in names:
            if each != "none":
                self._guarded(each, partial(self._add, each, directory, name, resumed_step))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The finite numbers among `values`."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(step, numbers))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _add(self, name: str, directory: Path, run: str, resumed_step: int | None) -> None:
        self._open[name] = _TRACKERS[name](directory, run, resumed_step)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(act, tracker))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 -- whatever a server, a network or a foreign package raises
            self._open.pop(name, None)
            log(f"--track {name} has ended: {type(error).__name__}: {error}; the run goes on without it")


def _identifier(folder: Path, resumed_step: int | None) -> str:
    """The run's id for a tracker; a resumed run reads it."""
    place = folder / "run-id.txt"
    if resumed_step is None or not place.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        place.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return place.read_text(encoding="utf-8")
