"""A small server that speaks as `infer rollouts` does, on transformers; it can be told to go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from shared.checkpoint.formats.safetensors_file import encode_header, header_bytes, tensor_bytes
from shared.runtime.weight_broadcast import BrokenBroadcastError, receive


class Policy:
    """A `Policy` of one process."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def full_weights(self) -> dict[str, Any]:
        return dict(self.module.state_dict())


class RolloutServer:
    """The state of a server.

    Attributes:
        published: (path, version) of each POST of /v1/policy; the path of a broadcast is "broadcast".
        requests: bodies of /v1/completions.
        before: called with each request's body ahead of the answer; may change the server, or raise.
        lies: takes a publication without its weights.
        receiving: called when the bytes of a broadcast come; may raise: ConnectionError breaks the connection off.
        dumb: answers nothing, and keeps connections open.
        failing: status of every answer.
        key: needed in every request.
        answer: changes the choice of a reply.
        named: the model that replies say they are of; None: the one that was asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.url = directory, ""
        self.published: list[tuple[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.before: Callable[[dict[str, Any]], None] = lambda body: None
        self.answer: Callable[[dict[str, Any]], None] = lambda choice: None
        self.receiving: Callable[[], None] = lambda: None
        self.lies = self.dumb = False
        self.named: str | None = None
        self.failing: int | None = None
        self.key: str | None = None
        self.max_model_len = 96
        self.precision = "fp32"
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """As a new process: the first weights, and the first version."""
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.version, self.path = "default", str(self.directory)

    def get(self, path: str) -> tuple[int, Any]:
        """The answer of a GET."""
        policy = {"version": self.version, "path": self.path, "precision": self.precision}
        models = {"data": [{"id": "policy", "max_model_len": self.max_model_len}]}
        answers = {"/v1/policy": policy, "/v1/models": models, "/health": {}}
        return (200, answers[path]) if path in answers else (404, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The answer of a POST."""
        if path == "/v1/policy":
            return self._receive(body) if "broadcast" in body else self._publish(body)
        with self._lock:
            self.requests.append(body)
            self.before(body)
            choice = self._complete(body)
        self.answer(choice)
        return 200, {"model": self.named or body["model"], "choices": [choice]}

    def _publish(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.published.append((body["path"], body["version"]))
        return self._take(load_file(Path(body["path"]) / "model.safetensors"), body["version"], body["path"])

    def _receive(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.published.append(("broadcast", body["version"]))
        said, held = body["broadcast"], bytearray()
        tensors = [(each["name"], each["dtype"], tuple(each["shape"])) for each in said["tensors"]]
        first = load_file(self.directory / "model.safetensors")
        if lacking := sorted(first.keys() - {name for name, *_ in tensors}):
            return 409, {"error": {"message": f"the broadcast lacks {lacking[0]}"}}

        def write(part: memoryview) -> None:
            held.extend(part)
            self.receiving()

        size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in tensors)
        group = {"rank": said["rank"], "ranks": said["ranks"], "address": "127.0.0.1"}
        try:
            receive(size, write, host="127.0.0.1", port=said["port"], **group)
        except BrokenBroadcastError as error:
            return 424, {"error": {"message": str(error)}}
        weights = load(header_bytes(encode_header(tensors, None)) + bytes(held))
        return self._take(weights, body["version"], "broadcast")

    def _take(self, weights: dict[str, torch.Tensor], version: str, path: str) -> tuple[int, Any]:
        first = load_file(self.directory / "model.safetensors")
        if lacking := sorted(first.keys() - weights.keys()):
            return 409, {"error": {"message": f"path {path} lacks {lacking[0]}"}}
        assert {n: (t.shape, t.dtype) for n, t in weights.items()} == {n: (t.shape, t.dtype) for n, t in first.items()}
        if not self.lies:
            self.model.load_state_dict(weights, strict=False)  # tied ones are absent
        self.version, self.path = version, path
        return 200, self.get("/v1/policy")[1]

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        assert (body["top_p"], body["top_k"], body["logprobs"]) == (1.0, 0, 0)
        generator = torch.Generator().manual_seed(body["seed"])
        ids, cache, chosen, said = torch.tensor([body["prompt"]]), None, [], []
        while len(chosen) < body["max_tokens"] and not (chosen and chosen[-1] in body["stop_token_ids"]):
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            log_probs = (out.logits[0, -1] / body["temperature"]).log_softmax(-1)
            chosen.append(int(torch.multinomial(log_probs.exp(), 1, generator=generator)))
            said.append(float(log_probs[chosen[-1]]))
            ids = torch.tensor([[chosen[-1]]])
        reason = "stop" if chosen[-1] in body["stop_token_ids"] else "length"
        return {"token_ids": chosen, "logprobs": {"token_logprobs": said}, "finish_reason": reason}


@contextmanager
def serving[Kind: RolloutServer](directory: Path, kind: type[Kind] = RolloutServer) -> Iterator[Kind]:  # type: ignore[assignment]
    """A server of a directory, on a free port."""
    server = kind(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self._answer(lambda body: server.get(self.path))

        def do_POST(self) -> None:
            self._answer(lambda body: server.post(self.path, body))

        def _answer(self, make: Callable[[Any], tuple[int, Any]]) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            while server.dumb:
                time.sleep(0.05)
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                status, content = 401, {"error": {"message": "no key"}}
            elif server.failing:
                status, content = server.failing, {"error": {"message": "the engine died"}}
            else:
                status, content = make(body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Http(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *words: object) -> None:
            """A client that has given up closes its connections: nothing to say."""

    http = Http(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.dumb = False
        http.shutdown()
        http.server_close()
