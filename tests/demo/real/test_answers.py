"""Asking every model of a server."""

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from real import answers
from real.data import asked

REAL = Path(answers.__file__).parent


class Models(BaseHTTPRequestHandler):
    """Two models, which answer with their name and the question."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "adapter"}, {"id": "base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0
        self.answer({"choices": [{"message": {"content": f"{body['model']}: {body['messages'][-1]['content']}"}}]})


def test_every_model_answers_every_question_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = [f"number {n}?" for n in range(60)]
    prompts.write_text("".join(json.dumps({"messages": asked(question)}) + "\n" for question in questions))
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 100)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = answers.all_models(f"http://127.0.0.1:{server.server_port}/v1", "base", prompts)
    finally:
        server.shutdown()
    assert list(found) == ["questions", "base", "adapter"]
    assert found["questions"] == questions
    assert found["adapter"] == [f"adapter: {question}" for question in questions]


SILENT = """
import json, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Silent(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "base"}]}).encode())

    def do_POST(self):
        self.log_request(200)  # "POST ..." to stderr
        time.sleep(60)

    def log_request(self, code):
        if self.command == "POST":
            super().log_request(code)

server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
print(f"ready http://127.0.0.1:{server.server_port}/v1 base", flush=True)
server.serve_forever()
"""


def test_a_stop_does_not_wait_for_replies(tmp_path: Path) -> None:
    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "base.json"
    prompts.write_text("".join(json.dumps({"messages": asked(f"{n}?")}) + "\n" for n in range(60)))
    command = [sys.executable, str(REAL), "ask", sys.executable, "-c", SILENT, "--", str(prompts), str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "POST" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert not target.exists()
