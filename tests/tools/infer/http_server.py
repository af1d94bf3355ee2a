"""A server that a test has started: ask it, wait for it."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path


def call(url: str, body: dict | None = None, key: str | None = None) -> tuple[int, dict | None]:
    """Status and JSON of a request; POST when there is a body."""
    data = json.dumps(body).encode() if body is not None else None
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text, status = answer.read(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
    return status, json.loads(text) if text else None


def ready(path: Path, alive) -> str:
    """The address that the server printed once it was ready."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        text = path.read_text() if path.exists() else ""
        if text.endswith("\n"):
            word, url, _ = text.split()
            assert word == "ready"
            return url
        assert alive(), "the server ended before it was ready"
        time.sleep(0.2)
    raise AssertionError("the server did not become ready")


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Server:
    """`infer serve` or `rollouts` in a fork of the launcher."""

    def __init__(self, launcher, *words: object) -> None:
        self.launcher = launcher
        self.pid, self.files = launcher.start(*words)

    @cached_property
    def url(self) -> str:
        """Its address, once it is ready."""
        return ready(self.files.with_suffix(".out"), lambda: not gone(self.pid))

    def log(self) -> str:
        return self.files.with_suffix(".err").read_text()

    def stop(self):
        os.kill(self.pid, signal.SIGTERM)
        return self.launcher.wait(self.pid, self.files)

    def completion(self, key: str | None = None, **asked) -> dict:
        """The first choice of a greedy completion with the log-probabilities of its tokens."""
        body = {"prompt": "The quick", "max_tokens": 12, "temperature": 0, "logprobs": 0, "return_token_ids": True}
        status, answer = call(f"{self.url}/completions", body | asked, key=key)
        assert status == 200, answer
        return answer["choices"][0]
