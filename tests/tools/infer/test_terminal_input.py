"""Typing, on a pseudo-terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.infer.terminal import Terminal
from tools.infer.terminal_input import history_file

ECHO = """
import sys
from pathlib import Path
from tools.infer.terminal_input import messages
for message in messages(Path(sys.argv[1])):
    print("got", repr(message), flush=True)
print("end")
"""


@pytest.fixture
def typed(tmp_path):
    """A function that starts the program on a terminal."""
    started = []

    def start(history: Path) -> Terminal:
        terminal = Terminal()
        with open(terminal.path, "r+b", buffering=0) as tty:
            process = subprocess.Popen(
                [sys.executable, "-c", ECHO, str(history)],
                stdin=tty, stdout=tty, stderr=tty,
                cwd=Path(__file__).parents[3], env=os.environ | {"TERM": "xterm"},
            )  # fmt: skip
        started.append((terminal, process))
        terminal.expect(">")
        return terminal

    yield start
    for terminal, process in started:
        process.kill()
        process.wait()
        terminal.close()


def test_lines_are_edited_pasted_dropped_and_kept(typed, tmp_path):
    terminal = typed(tmp_path / "state/history")
    terminal.type("one\x1b\rtwo\r")  # Alt-Enter
    terminal.expect(r"got 'one\ntwo'")
    terminal.type("three\\\rfour\r")  # a backslash before Enter
    terminal.expect(r"got 'three\nfour'")
    terminal.type("\x1b[200~a\nb\x1b[201~\r")  # a paste
    terminal.expect(r"got 'a\nb'")
    terminal.type("wrong\x03right\r")  # Ctrl-C
    terminal.expect("got 'right'")
    terminal.expect(">")  # before it, Ctrl-D is the terminal's own
    terminal.type("\x04")
    terminal.expect("end")
    assert (tmp_path / "state/history").stat().st_mode & 0o777 == 0o600
    later = typed(tmp_path / "state/history")
    later.type("\x1b[A\r")  # up
    later.expect("got 'right'")


def test_without_a_place_for_its_history_it_goes_on(typed, tmp_path):
    (tmp_path / "file").touch()
    terminal = typed(tmp_path / "file/history")
    terminal.type("x\r")
    terminal.expect("got 'x'")


def test_the_history_is_state_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "baton/infer-chat-history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert history_file() == Path("/home/me/.local/state/baton/infer-chat-history")
