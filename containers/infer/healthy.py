"""Health check of an `infer` container: its server process, if any, answers /health."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SERVERS = ("serve", "rollouts")  # commands of infer
DEFAULTS = {"--host": "127.0.0.1", "--port": "8000"}
EVERYWHERE = ("0.0.0.0", "::", "")  # wildcard addresses include the loopback


def command_lines() -> Iterator[list[str]]:
    """Command lines of all processes in the container."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield place.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # the process has ended
            continue


def address(words: list[str]) -> str | None:
    """`host:port` of the server that the command line starts, or None."""
    for index, word in enumerate(words[:-1]):
        if Path(word).name == "infer" and words[index + 1] in SERVERS:
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
    """1 if a server runs and does not answer, else 0."""
    for server in filter(None, map(address, command_lines())):
        try:
            urllib.request.urlopen(f"http://{server}/health", timeout=4).close()
        except (urllib.error.URLError, OSError) as error:
            print(f"http://{server}/health: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
