"""The golden curves: every run gives the recorded values; the comparison detects a change of the last digit."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("curves.py")
curves = runpy.run_path(str(SCRIPT))
RECORDED = (curves["CURVES"] / "dense.txt").read_text(encoding="utf-8")


def differences(now: str, recorded: str = RECORDED) -> list[str]:
    return list(curves["differences"]("dense", recorded, now))


def with_cpu(content: str, cpu: str) -> str:
    return "\n".join(f"# cpu: {cpu}" if line.startswith("# cpu: ") else line for line in content.splitlines())


def changed(row: int, factor: float, content: str = RECORDED) -> tuple[str, str, str]:
    """A file with the loss of one row changed; that number before and after."""
    lines = content.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    cells = lines[first + 1 + row].split()
    before, cells[1] = cells[1], repr(float(cells[1]) * factor)
    lines[first + 1 + row] = "  ".join(cells)
    return "\n".join(lines), before, cells[1]


def test_every_run_gives_the_recorded_numbers() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_recorded_curve_is_checked() -> None:
    assert {path.stem for path in curves["CURVES"].iterdir()} == set(curves["CURVES_KEPT"])


def test_on_the_same_cpu_the_last_digit_counts() -> None:
    assert differences(RECORDED) == []
    now, before, after = changed(row=3, factor=1 + 2**-50)
    assert differences(now) == [f"dense: loss of step 3 was {before}, is {after} (compared to the digit)"]


def test_only_the_first_difference_of_a_column_is_said() -> None:
    once, *_ = changed(row=2, factor=1.5)
    both, *_ = changed(row=3, factor=1.5, content=once)
    assert [line.split(" was ")[0] for line in differences(both)] == ["dense: loss of step 2"]


def test_on_another_cpu_the_tolerance_counts() -> None:
    tolerance = curves["CURVES_KEPT"]["dense"].relative
    near, far = (changed(row=3, factor=1 + tolerance * share)[0] for share in (0.9, 1.1))
    other = with_cpu(RECORDED, "another")
    assert differences(near, other) == []
    assert differences(far, other)


def test_other_commands_and_versions_are_differences() -> None:
    assert "versions" in differences(RECORDED.replace("# versions: ", "# versions: newer "))[0]
    assert "commands" in differences(RECORDED.replace("--steps 5", "--steps 6"))[0]


def test_another_row_or_column_is_a_difference() -> None:
    assert "steps or columns" in differences("\n".join(RECORDED.splitlines()[:-1]))[0]
    assert "steps or columns" in differences(RECORDED.replace("validation_loss", "held_out_loss"))[0]
