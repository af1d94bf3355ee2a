"""`infer evaluate --url`: a running server gives the results of its engine in this process."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shared.errors import UserError
from tests.tools.infer.http_server import Server
from tests.tools.infer.test_end_to_end_harness import tasks
from tools.infer.engines.server import served_model

__all__ = ["tasks"]  # a fixture


def test_results_of_a_server_are_those_of_its_engine(launcher, models, tasks, tmp_path):
    source = models("llama")
    (tmp_path / "keys").write_text("secret\n")
    server = Server(
        *(launcher, "serve", "--source", source, "--port", 0, "--precision", "fp32"),
        *("--api-key-file", tmp_path / "keys", "--served-model-name", "mine"),
    )
    named = ",".join(str(tasks / f"{name}.yaml") for name in ("held_out", "questions", "writes"))
    words = (
        "evaluate",
        "--source",
        source,
        "--tasks",
        named,
        "--generation-argument",
        "max_gen_toks=9",
        "--keep-samples",
    )
    here = launcher(*words, "--target", tmp_path / "here", "--precision", "fp32")
    assert here.code == 0, here.stderr
    key = ("--api-key-file", tmp_path / "keys")
    done = launcher(*words, "--target", tmp_path / "there", "--url", server.url, *key, "--served-model-name", "mine")
    assert done.code == 0, done.stderr
    wrong = launcher(*words, "--target", tmp_path / "wrong", "--url", server.url)
    assert wrong.code == 2
    assert f"--url {server.url}: needs a key: give --api-key-file" in wrong.stderr
    wrong = launcher(*words, "--target", tmp_path / "wrong", "--url", server.url, *key, "--served-model-name", "other")
    assert wrong.code == 2
    assert "--served-model-name other: the server has mine" in wrong.stderr
    assert server.stop().code == 0

    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("here", "there"))
    assert second["engine"] == "server"
    assert second["config"]["model_args"]["base_url"] == server.url
    for task, values in first["results"].items():
        for name, value in values.items():
            # Other batches: the last digits of sums differ.
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert second["results"][task][name] == wanted, (task, name)
    assert second["n-samples"] == first["n-samples"]
    written = [(tmp_path / side / "samples_writes.jsonl").read_text().splitlines() for side in ("here", "there")]
    one, other = ([json.loads(line)["resps"] for line in lines] for lines in written)
    assert one == other


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


def test_a_closed_port_is_named():
    with pytest.raises(UserError, match="--url http://127.0.0.1:9/v1: Connection refused"):
        served_model("http://127.0.0.1:9/v1", None, None)
