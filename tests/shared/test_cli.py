from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from shared.cli import ExistingDir, ExistingFile, Positive, Tool, invocation
from shared.errors import AlreadyDone, Interrupted, StageError, UserError

Run = Callable[..., tuple[int, str, str]]
calls: list[dict[str, Any]] = []


@pytest.fixture
def tool() -> Tool:
    tool = Tool("convert", summary="A tool for tests.")
    calls.clear()

    @tool.command(positional=("source",), not_fingerprinted=("workers",))
    def copy_weights(
        source: ExistingDir,
        target: Path,
        steps: Positive = 3,
        rate: Annotated[float, Field(ge=0)] = 0.5,
        kind: Literal["a", "b"] = "a",
        level: Literal[0, 1] | None = None,
        names: tuple[str, ...] = (),
        table: ExistingFile | None = None,
        workers: int = 1,
        overwrite: bool = False,
    ) -> None:
        """Copy weights.

        A second paragraph.

        Args:
            source: where from.
            target: where to,
                on two lines.
            steps: how many.
            rate: how fast.
            kind: which.
            level: how high.
            names: whose.
            table: by what.
            workers: by how many.
            overwrite: replace.
        """
        calls.append(locals())

    return tool


@pytest.fixture
def run(tool: Tool, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            tool.run([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


def test_values_arrive_in_the_annotated_types(run: Run, tmp_path: Path) -> None:
    code, *_ = run(
        "copy-weights",
        tmp_path,
        "--target=t",
        "--steps",
        "7",
        "--rate=1e-3",
        "--kind",
        "b",
        "--level",
        "1",
        "--names",
        "x,y",
        "--overwrite",
    )
    assert code == 0
    assert calls == [
        {
            "source": tmp_path,
            "target": Path("t"),
            "steps": 7,
            "rate": 0.001,
            "kind": "b",
            "level": 1,
            "names": ("x", "y"),
            "table": None,
            "workers": 1,
            "overwrite": True,
        }
    ]


@dataclass(frozen=True, kw_only=True)
class Basic:
    """What many commands take.

    Attributes:
        target: where to.
        steps: how many.
    """

    target: Path
    steps: Positive = 3


@dataclass(frozen=True, kw_only=True)
class Special(Basic):
    """One command's defaults.

    Attributes:
        rate: how fast.
        steps: how many of these.
    """

    rate: float = 0.5
    steps: Positive = 7


def test_a_dataclass_stands_for_its_flags(tool: Tool, run: Run) -> None:
    seen: list[Any] = []

    @tool.command(not_fingerprinted=("steps",))
    def walk(options: Special, far: bool = False) -> None:
        """Walk.

        Args:
            far: how far.
            target: where the walk ends.
        """
        seen.extend([options, far, invocation().options])

    assert run("walk", "--target", "t", "--rate=2", "--far")[0] == 0
    assert seen[:2] == [Special(target=Path("t"), rate=2.0), True]
    assert seen[2] == {"target": "t", "steps": 7, "rate": 2.0, "far": True}
    assert "--target must be given" in run("walk", "--steps", "3")[2]
    assert "--steps 0: input should be greater than 0" in run("walk", "--target", "t", "--steps", "0")[2]
    text = run("walk", "--help")[1]
    for said in ("where the walk ends.", "how many of these.", "how fast.", "how far.", "(default 7)"):
        assert said in text
    assert "where to." not in text


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--overwrite"], True),
        (["--overwrite=true"], True),
        (["--overwrite=false"], False),
        (["--no-overwrite"], False),
        ([], False),
    ],
)
def test_false_is_false(run: Run, tmp_path: Path, words: list[str], value: bool) -> None:
    assert run("copy-weights", tmp_path, "--target", "t", *words)[0] == 0
    assert calls[0]["overwrite"] is value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bogus"], "unknown flag --bogus"),
        (["--step", "2"], "did you mean --steps?"),
        (["--stesp=2"], "did you mean --steps?"),
        (["--over"], "did you mean --overwrite?"),
        (["-o"], "unknown flag -o"),
        (["--steps", "2", "--steps", "2"], "--steps is given twice"),
        (["--overwrite", "--no-overwrite"], "--overwrite is given twice"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--rate", "1"], "--steps needs a value"),
        (["--steps="], "--steps needs a value"),
        (["--steps", "two"], "--steps two: input should be a valid integer"),
        (["--steps", "2.5"], "--steps 2.5"),
        (["--steps", "-1"], "--steps -1: input should be greater than 0"),
        (["--rate", "inf"], "a finite number is required"),
        (["--kind", "c"], "--kind c: input should be 'a' or 'b'"),
        (["--level", "2"], "--level 2: input should be 0 or 1"),
        (["--overwrite=maybe"], "neither true nor false"),
        (["--no-overwrite=true"], "takes no value"),
        (["word"], "unexpected word 'word'"),
        (["--overwrite", "yes"], "unexpected word 'yes'"),
        (["--", "--bogus"], "'--'"),
        (["--table", "/nowhere"], "--table /nowhere: does not exist"),
        (["--table", "/"], "a file is required"),
        (["--config", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_usage_errors_exit_2_and_run_nothing(run: Run, tmp_path: Path, words: list[str], says: str) -> None:
    code, out, err = run("copy-weights", tmp_path, "--target", "t", *words)
    assert (code, out, calls) == (2, "", [])
    assert says in err
    assert err.startswith("convert copy-weights: error: ")
    assert err.count("\n") == 1


def test_a_path_that_may_not_be_looked_at_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    code, _, err = run("copy-weights", tmp_path, "--target", "t")
    assert (code, calls) == (2, [])
    assert f"{tmp_path}: permission denied" in err
    assert err.count("\n") == 1


def test_required_flags_and_commands_are_named(run: Run, tmp_path: Path) -> None:
    assert "--source, --target must be given" in run("copy-weights")[2]
    assert "--target must be given" in run("copy-weights", tmp_path)[2]
    code, _, err = run()
    assert code == 2
    assert "no command given; one of: copy-weights" in err
    assert "did you mean copy-weights?" in run("copy-weight")[2]
    assert calls == []


@pytest.mark.parametrize("position", range(4))
def test_help_anywhere_goes_to_stdout_and_runs_nothing(run: Run, tmp_path: Path, position: int) -> None:
    words = ["copy-weights", str(tmp_path), "--target", "t"]
    words.insert(position, "--help")
    code, out, err = run(*words)
    assert (code, err, calls) == (0, "", [])
    assert "copy-weights" in out
    if position:
        assert "where to, on two lines." in out
        assert "--kind a|b  (default a)" in out


def test_config_file_holds_any_flag_and_flags_win(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"source: {tmp_path}\ntarget: t\nsteps: 5\nrate: 0.25\nnames: [x, y]\noverwrite: true\n")
    assert run("copy-weights", "--config", config, "--steps", "9")[0] == 0
    assert (calls[0]["steps"], calls[0]["rate"], calls[0]["names"], calls[0]["overwrite"]) == (
        9,
        0.25,
        ("x", "y"),
        True,
    )
    config.write_text("stesp: 5\n")
    code, _, err = run("copy-weights", "--config", config)
    assert code == 2
    assert "unknown key 'stesp'; did you mean steps?" in err
    config.write_text("steps: [1\n")
    assert "cannot be read as YAML" in run("copy-weights", "--config", config)[2]
    config.write_text("steps: many\n")
    assert "--steps many" in run("copy-weights", tmp_path, "--target", "t", "--config", config)[2]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("--source x is wrong"), 2, "error: --source x is wrong"),
        (StageError("loss is NaN at step 3"), 1, "error: loss is NaN at step 3"),
        (Interrupted("saved at step 3"), 75, "saved at step 3"),
        (AlreadyDone("already done: t"), 0, "already done: t"),
        (OSError(errno.ENOSPC, "No space left on device", "t/x"), 1, "t/x: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "t"), 2, "t: permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "t"), 2, "t: file name too long; give another path"),
        (OSError(errno.EIO, "Input/output error", "t"), 1, "t: the disk failed: input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_decides_the_exit_code(
    tool: Tool, run: Run, error: BaseException, code: int, says: str
) -> None:
    @tool.command
    def fail() -> None:
        """Fail."""
        raise error

    found, _, err = run("fail")
    assert found == code
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_a_command_says_run_it_again(tool: Tool, run: Run, number: signal.Signals) -> None:
    def unhandled(*_: object) -> None:
        raise AssertionError("the command left the signal as it was")

    before = signal.signal(number, unhandled)
    left = []

    @tool.command
    def wait() -> None:
        """Wait."""
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            left.append(number)

    try:
        assert run("wait")[0] == 75
    finally:
        signal.signal(number, before)
    assert left == [number]


def test_defects_keep_their_traceback(tool: Tool) -> None:
    @tool.command
    def fail() -> None:
        """Fail."""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tool.run(["fail"])


def test_invocation_knows_the_resolved_options(tool: Tool, run: Run, tmp_path: Path) -> None:
    seen = []

    @tool.command(not_fingerprinted=("workers",))
    def record(target: Path, steps: int = 3, workers: int = 2, overwrite: bool = False) -> None:
        """Record."""
        seen.append(invocation())

    run("record", "--target", tmp_path, "--overwrite")
    assert (seen[0].tool, seen[0].command, seen[0].version) == ("convert", "record", tool.version)
    assert seen[0].options == {"target": str(tmp_path), "steps": 3, "workers": 2, "overwrite": True}
    assert seen[0].fingerprinted_options({}) == {"steps": 3}


def test_words_after_two_hyphens_go_to_the_parameter_that_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    tool = Tool("convert", summary="A tool for tests.")
    got: list[tuple[int, tuple[str, ...]]] = []

    @tool.command(rest="words")
    def pass_on(steps: Positive = 3, words: tuple[str, ...] = ()) -> None:
        """Pass words on.

        Args:
            steps: how many.
            words: for another program.
        """
        got.append((steps, words))
        assert invocation().options["words"] == list(words)

    for argv in (
        ["pass-on"],
        ["pass-on", "--steps", "1", "--", "--steps", "2", "--", "--help", ""],
        ["pass-on", "--help", "--", "x"],
        ["pass-on", "--words", "x"],
    ):
        with pytest.raises(SystemExit):
            tool.run(argv)
    assert got == [(3, ()), (1, ("--steps", "2", "--", "--help", ""))]
    out, err = capsys.readouterr()
    assert "[-- ...]" in out
    assert "for another program" in out
    assert "unknown flag --words" in err
