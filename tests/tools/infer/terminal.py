"""A terminal for a program under test: types into it, waits for what it shows, answers where the cursor is."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
_ASKS_FOR_CURSOR = b"\x1b[6n"


class Terminal:
    """A pseudo-terminal of 40 lines of 160 columns."""

    pid: int  # of the program

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.path = os.ttyname(self._slave)
        self.shown = ""  # since the last `expect`, without escape sequences

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def expect(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` is shown; what came before it is forgotten. Fails after `seconds`."""
        until = time.monotonic() + seconds
        while text not in (plain := _ESCAPES.sub("", self.shown)):
            left = until - time.monotonic()
            assert left > 0, f"{text!r} was not shown, but {plain!r}"
            if select.select([self._master], [], [], min(left, 1))[0]:
                data = os.read(self._master, 65536)
                if _ASKS_FOR_CURSOR in data:
                    os.write(self._master, b"\x1b[1;1R")
                self.shown += data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "")
        self.shown = plain.partition(text)[2]

    def close(self) -> None:
        """Hang up."""
        os.close(self._master)
        os.close(self._slave)
