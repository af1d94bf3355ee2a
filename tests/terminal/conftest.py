"""tmux with a shell in it, typed into by `send-keys` and read by `capture-pane`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Pane:
    """A shell of 100 columns and 30 lines with a long history."""

    def __init__(self, socket: str, **environment: str) -> None:
        self._words = ["tmux", "-L", socket, "-f", "/dev/null"]
        self._environment = os.environ | environment  # of the first client, and so of the server and its shell
        self._run("new-session", "-d", "-x", "100", "-y", "30", "-s", "pane", "bash --norc --noprofile")
        self.wait(lambda text: "$" in text or "#" in text)

    def _run(self, *words: str, sent: str | None = None) -> str:
        done = subprocess.run(
            [*self._words, *words], input=sent, capture_output=True, text=True, check=True, env=self._environment
        )
        return done.stdout

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, M-Enter, C-c, Up."""
        self._run("send-keys", "-t", "pane", *keys)

    def type(self, text: str) -> None:
        """Text, letter by letter as a person's."""
        self._run("send-keys", "-t", "pane", "-l", text)

    def paste(self, text: str) -> None:
        """As by the mouse: with brackets around it where the program has asked for them."""
        self._run("load-buffer", "-", sent=text)
        self._run("paste-buffer", "-p", "-t", "pane")

    def text(self) -> str:
        """All that is on the screen and has scrolled off it, long lines whole."""
        return self._run("capture-pane", "-p", "-J", "-S", "-", "-t", "pane")

    def styled(self) -> str:
        """The same with escape sequences of colours and styles."""
        return self._run("capture-pane", "-p", "-e", "-J", "-S", "-", "-t", "pane")

    def wait(self, wanted: Callable[[str], bool], seconds: float = 60) -> str:
        """The text, once it is as wanted."""
        until = time.monotonic() + seconds
        while not wanted(text := self.text()):
            assert time.monotonic() < until, text
            time.sleep(0.05)
        return text

    def clear(self) -> None:
        """Forget what is shown, as Ctrl-L does."""
        self.press("C-l")
        time.sleep(0.3)
        self._run("clear-history", "-t", "pane")

    def close(self) -> None:
        self._run("kill-server")


@pytest.fixture(scope="module")
def pane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pane]:
    assert shutil.which("tmux"), "tmux is not here: make test-terminal installs it"
    state = tmp_path_factory.mktemp("state")
    path = f"{ROOT / 'tools/infer/.venv/bin'}:{os.environ['PATH']}"
    made = Pane(f"baton-{os.getpid()}", PATH=path, XDG_STATE_HOME=str(state), OMP_NUM_THREADS="1", LANG="C.UTF-8")
    yield made
    made.close()
