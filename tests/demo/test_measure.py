"""Time and memory of a process tree, across interrupted runs; unigram baselines."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import driver
import measure
import metrics
import pytest
import unigram
from stages import Stage

GROW = "import subprocess, sys, time; x = bytearray(60 << 20); "
CHILD = f"{GROW} subprocess.run([sys.executable, '-c', {(GROW + 'time.sleep(1.5)')!r}])"


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    record = measure.Record(tmp_path / "demo.json")
    assert measure.run("grow", [sys.executable, "-c", CHILD], record) == 0
    took = record.stages["grow"]
    assert took.finished
    assert took.peak_bytes > 120 << 20
    assert took.seconds > 1.5


def test_the_numbers_of_a_finished_stage_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    command = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    record = measure.Record(path)
    measure.run("a", command, record)
    first = record.stages["a"]
    again = measure.Record(path)
    assert again.stages == {"a": first}
    measure.run("a", [sys.executable, "-c", ""], again)
    assert measure.Record(path).stages == {"a": first}


def test_a_stage_whose_output_was_removed_costs_what_its_new_run_costs(tmp_path: Path) -> None:
    record, output = measure.Record(tmp_path / "demo.json"), tmp_path / "out"
    command = (sys.executable, "-c", f"import pathlib; pathlib.Path({str(output)!r}).touch()")
    stage = Stage(name="a", command=command, output=output, says=str)
    record.stages["a"] = measure.Measured(seconds=1000, finished=True)
    output.touch()
    driver.run(stage, record)
    assert record.stages["a"].seconds == 1000
    output.unlink()
    driver.run(stage, record)
    assert record.stages["a"].finished
    assert record.stages["a"].seconds < 100


def test_a_failed_stage_is_added_up(tmp_path: Path) -> None:
    record = measure.Record(tmp_path / "demo.json")
    assert measure.run("a", [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"], record) == 3
    before = record.stages["a"].seconds
    assert not record.stages["a"].finished
    assert measure.run("a", [sys.executable, "-c", "import time; time.sleep(0.5)"], record) == 0
    assert record.stages["a"].seconds > before + 0.5
    assert record.stages["a"].finished


DRIVER = """
import sys
sys.path.insert(0, {demo!r})
import measure
from pathlib import Path
measure.SPOKEN = 0.1
code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
measure.run("long", [sys.executable, "-c", code, {pid!r}], measure.Record(Path({record!r})))
"""


def test_a_killed_demo_stops_its_stage_and_remembers_it(tmp_path: Path) -> None:
    pid, record = tmp_path / "pid", tmp_path / "demo.json"
    script = DRIVER.format(demo=str(Path(measure.__file__).parent), pid=str(pid), record=str(record))
    driver = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text() and record.exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    measure.Record(record).wait_for_earlier()
    assert measure._started(int(pid.read_text())) is None, "the stage outlived the demo"
    assert 0 < measure.Record(record).stages["long"].seconds < 20


def test_a_told_demo_lets_its_stage_save(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    measure.stop(process)
    assert process.returncode == 75
    assert signal.SIGTERM == 15


def test_unigram_code_length_is_the_sum_of_its_symbols() -> None:
    train, held_out = unigram.Counter({0: 3, 1: 1}), unigram.Counter({0: 2, 2: 1})
    expected = -2 * math.log2(4 / 7) - math.log2(1 / 7)
    assert unigram.code_length(train, 3, held_out) == pytest.approx(expected)
    assert unigram.byte_bits_per_byte([bytes(range(256))], [b"any"]) == pytest.approx(8)


def test_the_end_of_documents_costs_nothing(tmp_path: Path) -> None:
    facts = {"dtype": "uint16", "eos_token_id": 0, "vocab_size": 4, "splits": {"validation": {"utf8_bytes": 6}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": facts}))
    (tmp_path / "train.bin").write_bytes(b"\x01\0\x02\0\x03\0\0\0")
    (tmp_path / "validation.bin").write_bytes(b"\x01\0\x01\0\x02\0\0\0\0\0")
    assert unigram.token_bits_per_byte(tmp_path) == pytest.approx(3 * 2 / 6)


def test_scores_are_what_the_harness_wrote(tmp_path: Path) -> None:
    results = {"heldout": {"bits_per_byte,none": 2.5}, "replies": {"parses,samples": 0.25, "characters,samples": 31.5}}
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    assert (metrics.bits_per_byte(tmp_path), metrics.parse_rate(tmp_path)) == (2.5, 0.25)
    assert metrics.reply_length(tmp_path) == 31.5


def test_time_of_cores_is_of_the_whole_tree(tmp_path: Path) -> None:
    burn = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    record = measure.Record(tmp_path / "demo.json")
    measure.run("burn", [sys.executable, "-c", code], record)
    measure.run("sleep", [sys.executable, "-c", "import time; time.sleep(0.8)"], record)
    assert 0.6 < record.stages["burn"].cpu_seconds < 2
    assert record.stages["sleep"].cpu_seconds < 0.5
    assert measure.Record(tmp_path / "demo.json").stages == record.stages
