from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.directory.run_directory import RunDirectory, damage
from shared.errors import AlreadyDone, StageError, UserError
from shared.invocation import invoked

TRAINING = """
import sys
from pathlib import Path
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.directory.run_directory import RunDirectory
from shared.invocation import invoked
with invoked("pretrain", "train", {}):
    run = RunDirectory.open(Path(sys.argv[2]), kind="megatron", inputs={"source": Path(sys.argv[1])})
    print("begun", flush=True)
    run.add_auxiliary_files(Path(sys.argv[1]))
    for iteration in range((run.iteration or 0) + 1, 31):
        (run.begin(iteration) / "0.distcp").write_bytes(b"%04d" % iteration * 50_000)
        run.commit(iteration, facts={}, finished=iteration == 30)
"""


def _save(run: RunDirectory, iteration: int, *, finished: bool = False, keep: int = 2) -> None:
    (run.begin(iteration) / "0.distcp").write_text(str(iteration))
    run.commit(iteration, facts={"loss": 1.0}, finished=finished, keep=keep)


def test_iterations_are_published_one_by_one(source: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", kind="megatron", inputs={"source": source})
    run.add_auxiliary_files(source)
    with pytest.raises(UserError, match="not saved an iteration yet"):
        open_checkpoint(run.path, kinds=("megatron",), flag="--source")
    for iteration in (10, 20, 30):
        _save(run, iteration)
        checkpoint = open_checkpoint(run.path, kinds=("megatron",), flag="--source")
        assert (checkpoint.iteration_path / "0.distcp").read_text() == str(iteration)
        assert (checkpoint.hf_files / "config.json").exists()
    assert sorted(path.name for path in run.path.glob("iter_*")) == ["iter_0000020", "iter_0000030"]
    assert (run.path / "latest_checkpointed_iteration.txt").read_text() == "30"
    run.close()


def test_a_finished_run_is_done_and_another_needs_overwrite(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    _save(run, 10)
    run.finish()
    run.close()
    with pytest.raises(AlreadyDone):
        RunDirectory.open(target, kind="megatron", inputs={"source": source})
    with invoked("pretrain", "train", {"steps": 5}):
        with pytest.raises(UserError, match="--overwrite"):
            RunDirectory.open(target, kind="megatron", inputs={"source": source})
        again = RunDirectory.open(target, kind="megatron", inputs={"source": source}, overwrite=True)
    assert (again.iteration, list(target.glob("iter_*"))) == (None, [])
    again.close()


def test_an_unfinished_run_is_resumed_also_with_overwrite_and_kept_from_others(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    _save(run, 10)
    with pytest.raises(UserError, match="another process is writing it"):
        RunDirectory.open(target, kind="megatron", inputs={"source": source})
    run.close()
    with invoked("pretrain", "train", {"steps": 5}), pytest.raises(UserError, match="unfinished|other inputs"):
        RunDirectory.open(target, kind="megatron", inputs={"source": source})
    resumed = RunDirectory.open(target, kind="megatron", inputs={"source": source}, overwrite=True)
    assert resumed.iteration == 10
    resumed.close()


def test_a_run_in_progress_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    _save(run, 10)
    before = sorted(path.relative_to(target) for path in target.rglob("*"))
    with invoked("pretrain", "train", {"steps": 5}):
        with pytest.raises(UserError, match="another process is writing it"):
            RunDirectory.open(target, kind="megatron", inputs={"source": source}, overwrite=True)
        with (
            pytest.raises(UserError, match="another process is writing it"),
            publish(target, kind="megatron", inputs={"source": source}, overwrite=True),
        ):
            raise AssertionError("the block must not run")
    assert sorted(path.relative_to(target) for path in target.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]
    _save(run, 20)
    run.close()
    with invoked("pretrain", "train", {"steps": 5}):
        other = RunDirectory.open(target, kind="megatron", inputs={"source": source}, overwrite=True)
        with pytest.raises(UserError, match="another process is writing it"):  # the new directory is locked, too
            RunDirectory.open(target, kind="megatron", inputs={"source": source}, overwrite=True)
        other.close()


def test_a_refusal_names_what_differs(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    with invoked("pretrain", "train", {"steps": 5, "learning_rate": 0.1, "target": "run", "keep": 2}):
        run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
        begun = "repeat its command"
        for finished in (None, False, True):
            if finished is not None:
                begun = "choose another directory"
                _save(run, 10, finished=finished)
            run.close()
            with (
                invoked("pretrain", "train", {"steps": 6, "learning_rate": None, "target": "x", "keep": 2}),
                pytest.raises(
                    UserError,
                    match=rf"\(--steps 5, now 6; --learning-rate 0.1, now unset\); {begun}",
                ),
            ):
                RunDirectory.open(target, kind="megatron", inputs={"source": source})
            if not finished:
                run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
        (source / "new").write_text("x")
        with pytest.raises(UserError, match="another --source, or its content has changed"):
            RunDirectory.open(target, kind="megatron", inputs={"source": source})
    with invoked("sft", "train", {}), pytest.raises(UserError, match="with another command"):
        RunDirectory.open(target, kind="megatron", inputs={"source": source})


def test_a_run_without_an_option_is_the_run_with_its_default(source: Path, tmp_path: Path) -> None:
    """An option that a later version added."""
    target, inputs = tmp_path / "run", {"source": source}
    with invoked("pretrain", "train", {"steps": 5}):
        run = RunDirectory.open(target, kind="megatron", inputs=inputs)
        _save(run, 10)
        run.close()
    added = {"weights": None}
    with invoked("pretrain", "train", {"steps": 5, "weights": None}, added=added):
        run = RunDirectory.open(target, kind="megatron", inputs=inputs)
        assert run.iteration == 10
        run.close()
    with (
        invoked("pretrain", "train", {"steps": 5, "weights": (1, 2)}, added=added),
        pytest.raises(UserError, match=r"\(--weights unset, now \[1, 2\]\)"),
    ):
        RunDirectory.open(target, kind="megatron", inputs=inputs)


def test_inputs_fewer_or_in_another_order_are_other_inputs(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    target = tmp_path / "run"
    with invoked("pretrain", "train", {}):
        run = RunDirectory.open(target, kind="megatron", inputs={"data": [source, other]})
        _save(run, 10)
        run.close()
        for inputs in ([source], [other, source]):
            with pytest.raises(UserError, match="another --data, or its content has changed"):
                RunDirectory.open(target, kind="megatron", inputs={"data": inputs})


def test_a_damaged_iteration_gives_way_to_the_one_before(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    run.add_auxiliary_files(source)
    (target / "hf/README.md").write_text("a card")
    for iteration in (10, 20, 30):
        _save(run, iteration, keep=3)
    assert "hf/README.md" in run.recorded()
    (target / "hf/README.md").write_text("b card")  # edited while the run stood still
    assert damage(target, run.recorded()) is None
    file = target / "iter_0000030" / "0.distcp"
    file.write_text("31")
    found = damage(target, run.recorded())
    assert found == f"{file} is damaged: its content has changed since it was saved"
    assert run.fall_back(found) == 20
    assert [path.name for path in sorted(target.glob("iter_*"))] == ["iter_0000010", "iter_0000020"]
    assert damage(target, run.recorded()) is None
    assert open_checkpoint(target, kinds=("megatron",), flag="--source").iteration_path.name == "iter_0000020"
    for name, change in (("20", lambda file: file.write_text("2")), ("10", Path.unlink)):
        file = target / f"iter_00000{name}" / "0.distcp"
        change(file)
        found = damage(target, run.recorded())
        assert found is not None
        if name == "20":
            assert found == f"{file} has 1 bytes instead of 2"
            assert run.fall_back(found) == 10
    assert found == f"{file} is missing"
    with pytest.raises(StageError, match="no earlier iteration is kept"):
        run.fall_back(found)
    run.close()


def test_leftovers_of_a_kill_are_repaired(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    run = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    _save(run, 10)
    run.begin(20)
    (target / "iter_0000030").mkdir()  # renamed, the manifest not yet replaced
    (target / "latest_checkpointed_iteration.txt").write_text("9")
    run.close()
    resumed = RunDirectory.open(target, kind="megatron", inputs={"source": source})
    assert [path.name for path in target.glob("iter_*")] == ["iter_0000010"]
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "10"
    resumed.close()


def test_sigkill_at_random_points_always_leaves_a_complete_checkpoint(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    reached = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", TRAINING, source, target], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (target / "manifest.json").exists():
            checkpoint = open_checkpoint(target, kinds=("megatron",), flag="--source")
            assert checkpoint.manifest is not None
            iteration = checkpoint.manifest.iteration
            assert iteration is not None
            assert iteration >= reached
            assert (checkpoint.iteration_path / "0.distcp").read_bytes() == b"%04d" % iteration * 50_000
            reached = iteration
        if reached == 30:
            break
    subprocess.run([sys.executable, "-c", TRAINING, source, target], check=reached < 30, capture_output=True)
    assert open_checkpoint(target, kinds=("megatron",), flag="--source").manifest.iteration == 30  # type: ignore[union-attr]
