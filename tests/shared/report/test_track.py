"""Trackers of a run. TensorBoard is the real one; others are stand-ins for packages that no environment here has."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from shared.report.metrics import Metrics
from shared.report.track import Trackers, check_installed


class Calls(ModuleType):
    """A module whose every attribute is a function that records its calls and returns the module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.made: list[tuple] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*values, **named):
            self.made.append((name, *values, named))
            return self

        return call


@pytest.fixture
def stand_in(monkeypatch):
    """A function that installs a module that records its calls."""

    def install(name: str) -> Calls:
        module = Calls(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(directory)).Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_gets_numbers_and_a_resume_hides_what_it_repeats(tmp_path):
    first = Trackers(["tensorboard"], tmp_path, name="run", resumed_step=None)
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 * step, "name": "text", "bad": float("nan"), "moe_load": 2})
    first.close()
    resumed = Trackers(["tensorboard"], tmp_path, name="run", resumed_step=2)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    assert events(tmp_path / "tensorboard") == {
        "loss": [(1, 1.0), (2, 2.0), (3, 30.0)],
        "moe_load": [(1, 2.0), (2, 2.0)],
    }


def test_without_trackers_there_is_metrics_jsonl_alone(tmp_path):
    metrics = Metrics(tmp_path, resumed_step=None, track=("none",))
    metrics.append(step=1, loss=1.0)
    metrics.sync()
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(name, monkeypatch):
    monkeypatch.setattr("shared.report.track.find_spec", lambda package: None if package == name else object())
    check_installed(["tensorboard", "none"][:1])
    with pytest.raises(UserError, match=rf"--track {name} .*`pip --python {sys.executable} install {name}`$"):
        check_installed(["tensorboard", name])


def test_none_stands_alone():
    check_installed(["none"])
    with pytest.raises(UserError, match="none stands alone"):
        check_installed(["none", "tensorboard"])


def test_wandb_stays_on_the_machine_and_a_resumed_run_keeps_its_id(tmp_path, stand_in, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = stand_in("wandb")
    for resumed in (None, 5, None):
        run = Trackers(["wandb"], tmp_path, name="my run", resumed_step=resumed)
        run.log(6, {"loss": 2.0})
        run.close()
    begun = [named for name, *_, named in wandb.made if name == "init"]
    assert {(each["mode"], each["name"], each["dir"]) for each in begun} == {("offline", "my run", str(tmp_path))}
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert [value for name, value, *_ in wandb.made if name == "log"] == [{"step": 6, "loss": 2.0}] * 3
    assert [name for name, *_ in wandb.made].count("finish") == 3
    monkeypatch.setenv("WANDB_MODE", "online")
    Trackers(["wandb"], tmp_path, name="my run", resumed_step=None)
    assert [named["mode"] for name, *_, named in wandb.made if name == "init"][-1] == "online"


def test_mlflow_writes_beside_the_run_and_resumes_the_run_that_it_began(tmp_path, monkeypatch):
    made, uris = [], []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            uris.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="7")

        def search_runs(self, places, filter_string):
            return [run for run in made if f"'{run.tags['baton']}'" in filter_string]

        def create_run(self, place, run_name, tags):
            made.append(SimpleNamespace(info=SimpleNamespace(run_id=len(made)), tags=tags, logged=[], ended=0))
            return made[-1]

        def update_run(self, run, status): ...

        def log_batch(self, run, metrics):
            made[run].logged += metrics

        def set_terminated(self, run):
            made[run].ended += 1

    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    mlflow.MlflowClient = Client
    entities.Metric = lambda name, value, time, step: (name, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for resumed in (None, 1):
        run = Trackers(["mlflow"], tmp_path, name="run", resumed_step=resumed)
        run.log(1 + (resumed or 0), {"reward/py:file": 0.5})
        run.close()
    assert uris == [(tmp_path / "mlruns").as_uri()] * 2
    (one,) = made
    assert (one.logged, one.ended) == ([("reward/py_file", 0.5, 1), ("reward/py_file", 0.5, 2)], 2)


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, stand_in, capfd):
    wandb = stand_in("wandb")
    run = Trackers(["wandb", "tensorboard"], tmp_path, name="run", resumed_step=None)

    def fail(*values):
        raise ConnectionError("no route to the server")

    wandb.log = fail
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run.close()
    line = "--track wandb has ended: ConnectionError: no route to the server; the run goes on without it\n"
    assert capfd.readouterr().err.count(line) == 1
    assert events(tmp_path / "tensorboard") == {"loss": [(1, 1.0), (2, 1.0)]}
