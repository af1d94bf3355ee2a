"""`infer serve` over loopback: answers, shutdown, and refusals before the model is loaded."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
from vllm import AsyncEngineArgs, ModelRegistry
from vllm.entrypoints.launchers.api_server import entry
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from shared.errors import UserError
from tests.tools.infer.http_server import call, gone, ready
from tools.infer import serve
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.vllm import checked_arguments
from tools.infer.engines.vllm_flags import VllmFlags, parse

INFER = Path(sys.executable).with_name("infer")


def test_it_answers_the_api_and_ends_on_sigterm(models, greedy, tmp_path):
    source, out = models("llama"), tmp_path / "out"
    # without --precision: fp32, as the checkpoint
    command = [
        INFER,
        "serve",
        "--source",
        source,
        "--port",
        "0",
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "64",
    ]
    with out.open("w") as stdout, (tmp_path / "err").open("w") as stderr:
        server = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        url = ready(out, lambda: server.poll() is None)
        assert call(url.removesuffix("/v1") + "/health") == (200, None)
        status, listed = call(url + "/models")
        assert status == 200
        assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("tiny", 64)]  # the model's: 128
        long = {"model": "tiny", "prompt": [5] * 64, "max_tokens": 1}
        assert call(url + "/completions", long)[0] == 400
        assert call(url + "/completions", long | {"prompt": [5] * 63})[0] == 200

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


def test_keys_a_template_and_flags_of_vllm(launcher, models, greedy, tmp_path):
    """A server with all of them, which after SIGTERM finishes the request it has and takes no other."""
    (tmp_path / "keys").write_text("first\n\n second \n")
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    words = ["--source", models("qwen3"), "--port", 0, "--precision", "fp32", "--drain", 30]
    words += ["--api-key-file", tmp_path / "keys", "--chat-template", tmp_path / "other.jinja"]
    words += ["--", "--tool-call-parser", "hermes", "--enable-auto-tool-choice", "--max-logprobs", 2]
    words += ["--reasoning-parser", "minimax_m2_append_think"]  # it needs no token of its own: <think> is put in front
    pid, files = launcher.start("serve", *words)
    url = ready(files.with_suffix(".out"), lambda: not gone(pid))
    asked = {
        "model": "qwen3",
        "messages": [{"role": "user", "content": "The quick"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    assert call(url + "/chat/completions", asked)[0] == 401
    assert call(url + "/chat/completions", asked, key="third")[0] == 401
    for key in ("first", "second"):
        status, reply = call(url + "/chat/completions", asked, key=key)
        assert status == 200
        assert reply["choices"][0]["message"]["content"] == "<think>" + greedy(models("qwen3"), "The quick", 8)
    prompt = {"model": "qwen3", "prompt": "fox", "max_tokens": 1}
    assert call(url + "/completions", prompt | {"logprobs": 2}, key="first")[0] == 200
    status, answer = call(url + "/completions", prompt | {"logprobs": 3}, key="first")
    assert status == 400, "--max-logprobs is not vLLM's"
    assert "2" in answer["error"]["message"]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    assert call(url + "/chat/completions", asked | {"tools": [tool], "tool_choice": "auto"}, key="first")[0] == 200

    request = urllib.request.Request(
        url + "/completions",
        data=json.dumps(prompt | {"max_tokens": 100, "stream": True, "ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer first"},
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        stream.readline()
        os.kill(pid, signal.SIGTERM)
        pieces = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    done = launcher.wait(pid, files)
    assert done.code == 0, done.stderr
    assert "requests in flight: 1; they have 30 s" in done.stderr
    assert "cut off" not in done.stderr
    assert "first" not in done.stderr + done.stdout
    with pytest.raises(urllib.error.URLError):
        call(url + "/models", key="first")


def test_what_does_not_finish_in_time_is_cut_off(launcher, models):
    words = ["--source", models("llama"), "--port", 0, "--precision", "fp32", "--drain", 1]
    pid, files = launcher.start("serve", *words)
    url = ready(files.with_suffix(".out"), lambda: not gone(pid))
    address = urllib.parse.urlsplit(url)
    body = b'{"model": "llama", "prompt": "fox", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + body[:-1])  # and never the end
        time.sleep(1)
        os.kill(pid, signal.SIGTERM)
        done = launcher.wait(pid, files)
        assert connection.recv(12) == b"HTTP/1.1 503"
    assert done.code == 0, done.stderr
    assert "requests cut off: 1" in done.stderr
    assert "Traceback" not in done.stderr


REQUESTS = int(os.environ.get("BATON_REQUESTS", "200"))


def test_no_request_is_lost_while_two_servers_are_replaced(launcher, models, greedy):
    """Eight clients that try the other server where one does not answer, as a load balancer does."""
    source = models("llama")
    expected = greedy(source, "The quick", 4)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])

    def start(port):
        pid, files = launcher.start("serve", "--source", source, "--port", port, "--precision", "fp32")
        ready(files.with_suffix(".out"), lambda: not gone(pid))
        return pid, files

    servers = [start(port) for port in ports]
    answered, refused, wrong = [], [], []
    replaced = threading.Event()

    def ask(client):
        asked = {"model": "llama", "prompt": "The quick", "max_tokens": 4, "temperature": 0}
        while len(answered) < REQUESTS or not replaced.is_set():
            for attempt in range(20):
                try:
                    status, reply = call(f"http://127.0.0.1:{ports[(client + attempt) % 2]}/v1/completions", asked)
                except (OSError, http.client.HTTPException) as error:
                    refused.append(repr(error))
                    time.sleep(0.1)
                    continue
                answered.append(status)
                if status != 200 or reply["choices"][0]["text"] != expected:
                    wrong.append((status, reply))
                break
            else:
                wrong.append("no server answers")

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for client in clients:
        client.start()
    for index, port in enumerate(ports):
        pid, files = servers[index]
        os.kill(pid, signal.SIGTERM)
        done = launcher.wait(pid, files)
        assert done.code == 0, done.stderr
        assert "cut off" not in done.stderr
        servers[index] = start(port)
    replaced.set()
    for client in clients:
        client.join(timeout=300)
    print(f"requests answered: {len(answered)}, connections refused or closed: {len(refused)}")
    assert len(answered) >= REQUESTS
    assert wrong == []
    assert all("refused" in each or "closed" in each or "reset" in each for each in refused), set(refused)
    for pid, files in servers:
        os.kill(pid, signal.SIGTERM)
        assert launcher.wait(pid, files).code == 0


def test_a_file_without_keys_is_refused(models, tmp_path):
    (tmp_path / "keys").write_text("\n")
    words = [INFER, "serve", "--source", models("llama"), "--api-key-file", tmp_path / "keys"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "holds no key; write one a line" in done.stderr


def test_a_share_of_gpu_memory_is_vllms(models, monkeypatch):
    given = {}

    def arguments(source, settings, further):
        given.update(further)
        raise UserError("enough")

    monkeypatch.setattr(serve, "on_gpu", lambda: True)
    monkeypatch.setattr(serve, "parse", lambda words: VllmFlags(words=words, engine={}, frontend={}))
    monkeypatch.setattr(serve, "checked_arguments", arguments)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    server = serve.ServerSettings(host="127.0.0.1", port=0, gpu_memory=0.5)
    with pytest.raises(UserError, match="enough"):
        serve.run(models("llama"), server=server, settings=EngineSettings())
    assert given == {"gpu_memory_utilization": 0.5}


def test_a_share_of_gpu_memory_needs_a_gpu(launcher, models):
    done = launcher("serve", "--source", models("llama"), "--port", 0, "--gpu-memory", 0.5)
    assert done.code == 2
    assert "--gpu-memory: this machine has no GPU" in done.stderr


@pytest.fixture
def registry(monkeypatch):
    """vLLM's models, in which a check registers a class, as before afterwards."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))


@pytest.mark.parametrize(
    "words", [(), ("--disable-log-stats", "--enable-log-requests", "--max-num-batched-tokens", "512")]
)
@pytest.mark.usefixtures("registry")
def test_the_engine_is_that_of_vllm_serve(models, monkeypatch, words):
    """Defaults of vLLM depend on who asks: a server's batches on a large GPU have 1024 sequences, others' 128."""
    made = []

    class Engine:
        def shutdown(self, timeout=None):
            pass

        async def reset_mm_cache(self):
            pass

    def make(vllm_config, **given):
        made.append((vllm_config.scheduler_config, given))
        return Engine()

    flags = parse(words)
    arguments, _ = checked_arguments(models("llama"), EngineSettings(), flags.engine)
    options = flags.options("--model", arguments["model"])
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", make)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    async def both():
        with socket.socket() as listener:
            async with serve._engine(arguments, options, listener, None):
                pass
        theirs = AsyncEngineArgs(**arguments, enable_log_requests=options.enable_log_requests)
        async with entry.build_async_engine_client_from_engine_args(theirs):
            pass

    asyncio.run(both())
    ours, theirs = made
    several = {"client_addresses": {}, "client_count": 1, "client_index": 0}  # of one server, as by default
    assert ours[1] | several == theirs[1]
    assert ours[1]["disable_log_stats"] == ours[1]["enable_log_requests"] == bool(words)
    assert ours[0] == theirs[0]
    assert not words or ours[0].max_num_batched_tokens == 512


@pytest.mark.usefixtures("registry")
def test_the_engine_asks_for_the_defaults_of_a_server(models, monkeypatch):
    """On a CPU they are no others than those of nobody in particular."""
    asked = []

    class StopError(Exception):
        pass

    def create(self, usage_context=None):
        asked.append(usage_context)
        raise StopError

    arguments, _ = checked_arguments(models("llama"), EngineSettings())
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", create)

    async def enter():
        async with serve._engine(arguments, parse(()).options("--model", arguments["model"]), None, None):
            pass

    with pytest.raises(StopError):
        asyncio.run(enter())
    assert asked == [UsageContext.OPENAI_API_SERVER]
