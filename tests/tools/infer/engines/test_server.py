"""What is asked of a server before an evaluation; the evaluation itself: test_end_to_end_harness.py."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shared.errors import UserError
from tools.infer.engines.server import served_model


@pytest.fixture
def answering():
    """A function from the answer of GET /v1/models to the address of a server that gives it."""
    servers = []

    def start(status: int, body: object) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *words: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, {"data": []}, "the server has no model"),
        (200, {"other": 1}, "is no answer of OpenAI's API"),
        (200, {"data": [{"id": "a"}]}, "does not say max_model_len of a"),
        (500, {}, "status 500"),
        (401, {}, "needs a key: give --api-key-file"),
    ],
)
def test_what_is_no_server_of_a_model_is_named(answering, status, body, says):
    with pytest.raises(UserError, match=says):
        served_model(answering(status, body), None, None)


def test_an_adapter_has_the_context_of_its_base(answering):
    url = answering(200, {"data": [{"id": "base", "max_model_len": 99}, {"id": "legal", "parent": "base"}]})
    assert served_model(url, "legal", None).context_length == 99
    assert served_model(url, None, None).name == "base"


def test_another_model_than_the_server_has_is_named(answering):
    url = answering(200, {"data": [{"id": "mine", "max_model_len": 99}]})
    with pytest.raises(UserError, match="--served-model-name other: the server has mine"):
        served_model(url, "other", None)


def test_a_closed_port_is_named():
    with pytest.raises(UserError, match="--url http://127.0.0.1:9/v1: Connection refused"):
        served_model("http://127.0.0.1:9/v1", None, None)
