"""The health of an `infer` container: the server among its processes, if there is one, answers /health."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

DEFAULTS = {"--host": "127.0.0.1", "--port": "8000"}
EVERYWHERE = ("0.0.0.0", "::", "")  # such a server answers on the loopback, too


def command_lines() -> Iterator[list[str]]:
    """The words of every process of this container."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield place.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # it has ended since
            continue


def address(words: list[str]) -> str | None:
    """`host:port` of the server that this command line starts; None if it starts none."""
    for index, word in enumerate(words[:-1]):
        if Path(word).name == "infer" and words[index + 1] == "serve":
            break
    else:
        return None
    given = dict(DEFAULTS)
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in given:
            given[name] = value if equals else words[index + 1]
    host = DEFAULTS["--host"] if given["--host"] in EVERYWHERE else given["--host"]
    return f"[{host}]:{given['--port']}" if ":" in host else f"{host}:{given['--port']}"


def main() -> int:
    """0 unless a server is there that does not answer."""
    for server in filter(None, map(address, command_lines())):
        try:
            urllib.request.urlopen(f"http://{server}/health", timeout=4).close()
        except (urllib.error.URLError, OSError) as error:
            print(f"http://{server}/health: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
