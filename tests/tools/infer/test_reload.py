"""`infer reload` and the servers it speaks to: two with two directories, shared by all tests of this file."""

from __future__ import annotations

import http.server
import itertools
import json
import shutil
import threading
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import StageError, UserError
from tests.tools.infer.http_server import Server, call
from tools.infer import reload

KEY = "of-ours"
# Of log-probabilities between transformers and vLLM, both in fp32, of 2 layers: they add in other orders.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def policies(models, tmp_path_factory):
    """A folder with the directories 0, 1, 2 and broken ones of the same model with other numbers."""
    folder = tmp_path_factory.mktemp("policies")
    for number in range(3):
        path = shutil.copytree(models("llama"), folder / str(number))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
        noise = torch.Generator().manual_seed(number)
        weights = load_file(path / "model.safetensors")
        for name, tensor in weights.items():
            weights[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    def broken(name, edit):
        path = shutil.copytree(folder / "1", folder / name) / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path, metadata={"format": "pt"})

    last = "model.layers.1.mlp.up_proj.weight"
    broken("nan", lambda weights: weights[last].fill_(float("nan")))
    broken("half", lambda weights: [weights.pop(name) for name in sorted(weights)[4:]])
    broken("shape", lambda weights: weights.update({last: weights[last][1:].contiguous()}))
    with (shutil.copytree(folder / "1", folder / "cut") / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    return folder


@pytest.fixture(scope="module")
def servers(launcher, policies, tmp_path_factory):
    """One that begins with directory 0, and one that begins with directory 1."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    words = ["--port", 0, "--served-model-name", "m", "--reload-from", policies, "--api-key-file", keys]
    started = [Server(launcher, "serve", "--source", path, *words) for path in (policies / "0", policies / "1")]
    yield SimpleNamespace(first=started[0], other=started[1], both=started, keys=keys)
    for server in started:
        done = server.stop()
        assert done.code == 0, done.stderr
        assert "Traceback" not in done.stderr


def answers(server):
    """Everything that depends on the weights: short, and longer than a block of the prefix cache."""
    long = [3 + index % 97 for index in range(200)]
    choices = [server.completion(key=KEY), *(server.completion(key=KEY, prompt=long, max_tokens=6) for _ in range(2))]
    return [{name: choice[name] for name in ("token_ids", "logprobs")} for choice in choices]


def of_transformers(path, ids, begin):
    """Log-probabilities of `ids[begin:]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        known = model(torch.tensor([ids])).logits[0, begin - 1 : -1].log_softmax(-1)
    return known.gather(-1, torch.tensor(ids[begin:])[:, None])[:, 0]


def test_a_broken_directory_changes_nothing_and_a_whole_one_makes_it_the_fresh_server(servers, policies, launcher):
    first, fresh = servers.first, answers(servers.other)
    old = answers(first)
    assert old != fresh
    with_key = ("--api-key-file", servers.keys)
    for name, message in {
        "nan": "up_proj.weight has numbers that are NaN",
        "half": "lacks model.layers",
        "shape": "up_proj.weight is [95, 64], the server's is [96, 64]",
        "cut": "is truncated",
        "absent": "is not a directory",
        "../keys": "is not below",
    }.items():
        done = launcher("reload", first.url, policies / name, *with_key)
        assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
        assert answers(first) == old  # bit for bit
    done = launcher("reload", first.url, policies / "1")
    assert done.code == 2
    assert "needs a key: give --api-key-file" in done.stderr
    assert answers(first) == old
    assert call(f"{first.url}/policy")[0] == 401
    assert call(f"{first.url}/policy", key=KEY)[1]["version"] == "default"

    done = launcher("reload", "--url", first.url.removesuffix("/v1"), "--source", policies / "1", *with_key)
    assert done.code == 0, done.stderr
    assert answers(first) == fresh
    answer = {"version": "1", "path": str(policies / "1"), "precision": "fp32"}
    assert call(f"{first.url}/policy", key=KEY) == (200, answer)


def stream(server, pieces):
    """A completion of 100 tokens; `pieces` gets each token and its log-probability as it comes."""
    asked = {"model": "m", "prompt": "The quick", "max_tokens": 100, "temperature": 0, "logprobs": 0}
    asked |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}/completions", data=json.dumps(asked).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                pieces.extend(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_a_reply_in_flight(servers, policies, mode):
    """`wait`: it is the old weights'. `keep`: from one token on it is the new weights', exactly."""
    prompt = servers.first.completion(key=KEY, max_tokens=1)["prompt_token_ids"]
    for attempt in itertools.count(1):
        old, new = (policies / name for name in ("12" if attempt % 2 else "21"))
        publish = {"path": str(old), "version": "old"}
        assert call(f"{servers.first.url}/policy", publish, key=KEY)[0] == 200
        pieces: list[tuple[int, float]] = []
        reader = threading.Thread(target=stream, args=(servers.first, pieces))
        reader.start()
        while len(pieces) < 3:
            assert reader.is_alive()
        publish = {"path": str(new), "version": f"{mode} {attempt}", "mode": mode}
        status, answer = call(f"{servers.first.url}/policy", publish, key=KEY)
        assert (status, answer["version"]) == (200, f"{mode} {attempt}")
        done_at = len(pieces)
        reader.join()
        ids, said = prompt + [token for token, _ in pieces], torch.tensor([known for _, known in pieces])
        assert len(pieces) == 100
        olds, news = ((of_transformers(path, ids, len(prompt)) - said).abs() < TOLERANCE for path in (old, new))
        switch = int(olds.long().cumprod(0).sum())  # tokens of the old weights
        assert switch >= 3
        assert bool(news[switch:].all())
        if mode == "wait":
            assert (switch, done_at) == (100, 100)
            break
        if switch < 100:
            break
        assert attempt < 20, "no publication came in time"


def test_two_servers_are_replaced_in_turn_and_every_answer_is_one_weights(servers, policies):
    """Eight clients ask on. Each answer is whole: the old directory's or the new one's."""
    for server in servers.both:
        assert call(f"{server.url}/policy", {"path": str(policies / "1"), "version": "1"}, key=KEY)[0] == 200
    old = servers.other.completion(key=KEY, max_tokens=8)
    replaced, lost = threading.Event(), []
    seen: list[tuple[float, ...]] = []

    def ask(client):
        while not replaced.is_set():
            try:
                choice = servers.both[client % 2].completion(key=KEY, max_tokens=8)
                seen.append((choice["text"], choice["logprobs"]["token_logprobs"]))
            except Exception as error:  # noqa: BLE001 -- counted
                lost.append(error)

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for client in clients:
        client.start()
    for server in servers.both:
        assert call(f"{server.url}/policy", {"path": str(policies / "2"), "version": "2"}, key=KEY)[0] == 200
    replaced.set()
    for client in clients:
        client.join(timeout=60)
    new = servers.other.completion(key=KEY, max_tokens=8)
    assert new["text"] != old["text"]
    assert lost == []
    assert seen
    for text, known in seen:
        wanted = next(choice for choice in (old, new) if choice["text"] == text)
        # a batch adds in another order than a lone request
        assert known == pytest.approx(wanted["logprobs"]["token_logprobs"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "is not an address"),
        ("ftp://127.0.0.1", "is not an address"),
        ("http://", "is not an address"),
        ("http://127.0.0.1:9/v1?x=1", "is not an address"),
        ("http://127.0.0.1:9", "--url http://127.0.0.1:9: Connection refused"),
        ("http://no.such.host.invalid", "--url http://no.such.host.invalid: "),
    ],
)
def test_a_server_that_is_not_there(url, message, tmp_path):
    with pytest.raises(UserError, match=message):
        reload.run(url, tmp_path, version=None, api_key_file=None, timeout=5)


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (404, b"{}", UserError, "takes no other weights; start the server with"),
        (409, b'{"error": {"message": "of the server"}}', UserError, "of the server"),
        (500, b'{"error": {"message": "the server ends"}}', StageError, "the server ends"),
        (502, b"<html>", StageError, "status 502"),
        (200, b"<html>", StageError, "the answer broke off"),
        (0, b"", StageError, "the answer broke off"),
        (-1, b"", StageError, "did not answer within 1 s"),
    ],
)
def test_what_a_server_may_answer(status, body, kind, message, tmp_path):
    slow = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            if status < 0:
                slow.wait(timeout=30)
            if status > 0:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with pytest.raises(kind, match=message):
                reload.run(
                    f"http://127.0.0.1:{server.server_port}", tmp_path, version="1", api_key_file=None, timeout=1
                )
        finally:
            slow.set()
            server.shutdown()
