"""Records of a rank: phases, and how long each may take."""

import json
import os
import signal
import threading

import pytest

from shared.runtime import progress


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A function that reads the record of this process, watched by nobody."""
    monkeypatch.setenv(progress.DIRECTORY, str(tmp_path))
    monkeypatch.setenv("RANK", "3")

    def read():
        return json.loads((tmp_path / "rank-3.progress").read_text())

    yield read
    progress.end()


def test_a_phase_is_named_counted_and_limited(record):
    progress.begin(50)
    thread = f"0x{threading.main_thread().ident:016x}"
    began = {"thread": thread, "beat": 1, "phases": 1, "phase": "starting", "limit": 1800.0, "timeout": 50}
    assert record() == began
    progress.update(7)
    assert record() == {**began, "beat": 2, "phases": 2, "phase": "update 7: reading the data", "limit": 600.0}
    progress.at("forward and backward")
    progress.beat()
    assert (record()["beat"], record()["phases"]) == (4, 3)
    assert record()["phase"] == "update 7: forward and backward"
    progress.at("saving update 7", long=True)
    assert (record()["phase"], record()["limit"]) == ("saving update 7", 1800.0)


@pytest.mark.parametrize(
    ("timeout", "seconds", "limit"),
    [
        (50, [1, 2, 100], 50),  # ten times the median is less
        (50, [30, 30, 31], 300),
        (50, [1000] + 20 * [6], 60),  # the last twenty count
        (700, [], 700),
    ],
)
def test_an_update_may_take_ten_times_the_median(timeout, seconds, limit, record):
    progress.begin(timeout)
    for each in seconds:
        progress.updated(each)
    progress.update(9)
    assert record()["limit"] == limit


def test_a_long_timeout_lengthens_all_phases(record):
    progress.begin(600)
    assert record()["limit"] == 6000


def test_nothing_is_written_without_a_watch(record, tmp_path):
    progress.begin(0)
    progress.update(1)
    progress.beat()
    progress.updated(1.0)
    progress.end()
    assert list(tmp_path.iterdir()) == []


def test_the_end_empties_the_record_and_frees_the_signal(record, tmp_path):
    progress.begin(50)
    progress.end()
    assert (tmp_path / "rank-3.progress").read_text() == ""
    assert signal.getsignal(progress.STACK_SIGNAL) == signal.SIG_DFL
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        progress.begin(50)
    progress.end()
    assert len(os.listdir("/proc/self/fd")) == descriptors
