"""`infer serve` over loopback: answers, shutdown, and refusals before the model is loaded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

INFER = Path(sys.executable).with_name("infer")


def call(url: str, body: dict | None = None) -> tuple[int, dict | None]:
    """Status and JSON of a request; POST when there is a body."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
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


def test_it_answers_the_api_and_ends_on_sigterm(models, greedy, tmp_path):
    source, out = models("llama"), tmp_path / "out"
    # without --precision: fp32, as the checkpoint
    command = [INFER, "serve", "--source", source, "--port", "0", "--served-model-name", "tiny"]
    with out.open("w") as stdout, (tmp_path / "err").open("w") as stderr:
        server = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        url = ready(out, lambda: server.poll() is None)
        assert call(url.removesuffix("/v1") + "/health") == (200, None)
        status, listed = call(url + "/models")
        assert status == 200
        assert [model["id"] for model in listed["data"]] == ["tiny"]

        asked = {"model": "tiny", "prompt": "The quick", "max_tokens": 12, "temperature": 0}
        status, completion = call(url + "/completions", asked)
        assert status == 200
        assert completion["choices"][0]["text"] == greedy(source, "The quick", 12)

        messages = [{"role": "user", "content": "fox?"}]
        asked = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        status, reply = call(url + "/chat/completions", asked)
        assert status == 200
        assert reply["choices"][0]["message"]["content"] == greedy(source, messages, 12)

        assert call(url + "/completions", asked | {"model": "other", "prompt": "x"})[0] == 404

        port = url.rpartition(":")[2].removesuffix("/v1")
        second = subprocess.run(
            [INFER, "serve", "--source", source, "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 2
        assert f"--port {port}: Address already in use" in second.stderr

        own = psutil.Process(server.pid)
        engines = own.children(recursive=True)
        assert engines
        listening = {
            process.pid
            for process in (own, *engines)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port)
        }
        assert listening == {server.pid}, "the engine holds the port too"

        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0, (tmp_path / "err").read_text()
        assert time.monotonic() - began < 15
    finally:
        server.kill()
        server.wait()


def test_without_a_chat_template_the_chat_endpoint_says_so_and_a_dead_engine_ends_the_server(launcher, models):
    pid, files = launcher.start("serve", "--source", models("qwen3"), "--port", 0, "--precision", "fp32")
    url = ready(files.with_suffix(".out"), lambda: not gone(pid))
    asked = {"model": "qwen3", "messages": [{"role": "user", "content": "fox?"}], "max_tokens": 3}
    status, answer = call(url + "/chat/completions", asked)
    assert status == 400
    assert "chat template" in answer["error"]["message"]
    assert call(url + "/completions", {"model": "qwen3", "prompt": "fox", "max_tokens": 3})[0] == 200

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    done = launcher.wait(pid, files)
    assert done.code == 1, done.stderr
    assert "the engine died" in done.stderr


def test_sigterm_while_it_loads_ends_it_and_leaves_no_engine(launcher, models):
    pid, files = launcher.start("serve", "--source", models("llama"), "--port", 0, "--precision", "fp32")
    err = files.with_suffix(".err")
    while not err.exists() or "loading" not in err.read_text():
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    done = launcher.wait(pid, files)
    assert done.code == 0, done.stderr
    assert done.stdout == ""


def test_the_end_of_a_jobs_time_stops_it_with_the_code_to_start_again(launcher, models):
    """SIGUSR1 to every process, as some Slurm clusters send it."""
    pid, files = launcher.start("serve", "--source", models("llama"), "--port", 0, "--precision", "fp32")
    ready(files.with_suffix(".out"), lambda: not gone(pid))
    for process in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        os.kill(process, signal.SIGUSR1)
    done = launcher.wait(pid, files)
    assert done.code == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert "the same command serves again" in done.stderr


def test_a_port_in_use_is_refused_at_once(models, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = [sys.executable, "-X", "importtime", INFER, "serve", "--source", models("llama"), "--port", port]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    *imports, message = done.stderr.splitlines()
    assert f"--port {port}" in message
    assert "choose another port" in message
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "tools.infer.serve" in imported
    assert not imported & {"torch", "vllm", "transformers"}  # they take half a minute


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_server_that_is_killed_takes_its_engine_along(launcher, models):
    pid, files = launcher.start("serve", "--source", models("llama"), "--port", 0, "--precision", "fp32")
    ready(files.with_suffix(".out"), lambda: not gone(pid))
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert children
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait(pid, files).code == -signal.SIGKILL
    until = time.monotonic() + 20
    while not all(gone(child) for child in children):
        assert time.monotonic() < until, "the engine outlives its server"
        time.sleep(0.1)


@pytest.mark.parametrize("host", ["no.such.host.invalid"])
def test_an_unknown_host_is_refused(models, host):
    words = [INFER, "serve", "--source", models("llama"), "--host", host]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"--host {host}" in done.stderr


def test_remote_code_of_a_tokenizer_is_refused_before_the_engine_starts(launcher, models, tmp_path):
    for file in models("llama").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code = {"tokenizer_class": "OurTokenizer", "auto_map": {"AutoTokenizer": ["ours.OurTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    done = launcher("serve", "--source", tmp_path, "--port", "0")
    assert done.code == 2
    assert done.stderr.count("code in the directory, which is not run") == 1
    assert "Traceback" not in done.stderr
