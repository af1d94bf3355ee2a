"""The hostile load finds what is wrong with a server: here a small one that can be made to misbehave."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import hostile, known
from tests.hostile.hostile import LEAST, Client, attack, growth
from tests.hostile.known import Known, is_known

SCHEMA = {
    "openapi": "3.1.0",
    "info": {"title": "small", "version": "1"},
    "paths": {
        path: {"get": {"parameters": [{"name": "n", "in": "query", "schema": {"type": "integer"}}], "responses": {}}}
        for path in ("/fine", "/faulty", "/slow")
    },
}


class Small(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/openapi.json":
            self.answer(200, json.dumps(SCHEMA))
        elif path in self.server.faults:  # type: ignore[attr-defined]
            if path == "/slow":
                time.sleep(4)
            self.answer(500, "the small server's fault")
        else:
            self.answer(200, "{}")

    def refuse(self) -> None:
        self.close_connection = True
        self.answer(405, "{}")

    def do_POST(self) -> None:
        if not self.path.startswith("/v1/"):
            return self.refuse()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults = self.server.faults  # type: ignore[attr-defined]
        if self.path == "/v1/policy" and "refusing" in faults:
            self.answer(409, "{}")
        elif len(body.get("prompt", "")) > 1000:
            self.answer(200 if "long" in faults else 400, "{}")
        elif body.get("stream"):
            self.answer(200, "data: {}\n\n" * 9 + ("" if "cut" in faults else "data: [DONE]\n\n"))
        else:
            adapted = body.get("model") == "operator" and "deaf" not in faults
            text = f"at {time.monotonic()}" if "changing" in faults else "lazy dog" if adapted else "brown fox"
            self.answer(200, json.dumps({"choices": [{"text": text}]}))
        return None

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *words: Any) -> None:  # clients that leave early, which is the purpose
        pass


@pytest.fixture
def small() -> Iterator[Any]:
    server = Server(("127.0.0.1", 0), Small)
    server.faults = set()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def test_faults_and_requests_without_an_answer_are_found(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "ANSWER", 2)
    small.faults.update(("/faulty", "/slow"))
    rows: list[dict[str, Any]] = []
    wanted = {("/faulty", 500), ("/slow", None)}
    for seed in range(5):  # the first time is enough but on a busy machine
        found = attack(small.url, os.getpid(), 6, seed=seed, ordinary=1, every=0.2)
        rows += [json.loads(each) for each in found.wrong if each.startswith("{")]
        if {(row["path"], row["status"]) for row in rows} >= wanted:
            break
    assert {(row["path"], row["status"]) for row in rows} >= wanted
    faulty = [row for row in rows if row["status"] == 500]  # 501: a method that Python's server does not know
    assert {row["path"] for row in faulty} <= {"/faulty", "/slow"}
    assert all("fault" in row["said"] for row in faulty)
    assert found.statuses["200"] > 0
    assert found.statuses["ordinary"] > 0
    assert len(found.memory) > 3
    assert all(size > 1 << 20 for _, size in found.memory)
    monkeypatch.setattr(
        known, "KNOWN", (Known(name="of the small server", path="/fau.*", said="server's fault", why="a test"),)
    )
    assert {is_known(row) for row in faulty if row["path"] == "/faulty"} == {"of the small server"}
    assert {is_known(row) for row in rows if not row["status"]} == {None}
    other = {"path": "/faulty", "status": 500, "said": "another"}
    assert is_known(other) is None
    assert is_known(other | {"path": "/x/faulty", "said": "server's fault"}) is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("changing", "the greedy answer has become"),
        ("long", "a prompt beyond the context is answered with 200"),
        ("cut", "data: {}"),
    ],
)
def test_plain_requests_are_checked(small: Any, fault: str, said: str) -> None:
    client = Client(small.url)
    expected = client.greedy()
    for deed in hostile._ordinary(client, expected):
        deed()
    small.faults.add(fault)
    wrong = []
    for deed in hostile._ordinary(client, expected):
        try:
            deed()
        except AssertionError as error:
            wrong.append(str(error))
    assert wrong
    assert all(said in each for each in wrong)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refusing", "policy is answered with 409"),
        ("deaf", "the adapter changes nothing"),
        ("changing", "the adapter's greedy answer is 'at "),
    ],
)
def test_an_operator_is_checked(small: Any, fault: str, said: str, tmp_path: Path) -> None:
    client = Client(small.url)
    act = hostile._operator(client, client.greedy(), tmp_path)
    act()
    small.faults.add(fault)
    with pytest.raises(AssertionError, match=said):
        act()


def test_the_operator_acts_beside_the_rest(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "LONGER", 4)
    found = attack(small.url, os.getpid(), 1, ordinary=1, every=0.2, exchanged=tmp_path)
    assert found.random >= LEAST, "however short the time"
    assert found.statuses["operator"] > 3
    assert not [each for each in found.wrong if each.startswith("operator")]


def test_growth_is_judged_without_the_warm_up() -> None:
    settled = [(float(at), 100 + min(at, 20)) for at in range(101)]
    assert growth(settled) == 0
    assert growth([(at, size + at) for at, size in settled]) == pytest.approx(60 / 150, rel=0.01)
    assert growth([(at, 200 - int(at)) for at, _ in settled]) < 0
