"""`/v1/policy` with an engine that notes its calls. With vLLM's: test_reload.py."""

from __future__ import annotations

import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file

from shared.runtime import weight_broadcast
from tests.tools.infer.broadcasting import announced, broadcast
from tools.infer import policy_route
from tools.infer.weight_check import ServedWeights


class Engine:
    """The methods of `AsyncLLM` that an exchange calls; `answers` are those of the workers."""

    model_config = SimpleNamespace(dtype=torch.bfloat16)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers = {"baton_open": ["", ""], "baton_swap": [None, None]}
        self.known = "default"
        self.reset = True

    async def pause_generation(self, *, mode, clear_cache):
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self):
        self.calls.append("resume")

    async def collective_rpc(self, method, args=()):
        self.calls.append(method)
        if method == "baton_open":
            self.opened = [load_file(path) for path, *_ in args[0]]
        if isinstance(self.answers[method], Exception):
            raise self.answers[method]
        return self.answers[method]

    async def reset_prefix_cache(self, reset_running_requests):
        self.calls.append("reset")
        return self.reset

    async def update_weight_version(self, version):
        self.known = version

    async def get_weight_version(self):
        return self.known


@pytest.fixture
def served(models, tmp_path, monkeypatch):
    """A client, the engine behind it, the route, and a directory that is taken."""
    folder = tmp_path / "policies"
    newer = shutil.copytree(models("llama"), folder / "newer")
    engine, app = Engine(), FastAPI()
    route = policy_route.PolicyRoute(ServedWeights.read(models("llama")), folder, engine, broadcasts=True)
    app.include_router(route.router)
    ended: list[bool] = []
    monkeypatch.setattr(policy_route, "stop_at_once", lambda: ended.append(True))
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    return SimpleNamespace(client=client, engine=engine, route=route, newer=newer, ended=ended)


def publish(served, **fields):
    return served.client.post("/v1/policy", json={"path": str(served.newer), "version": "2"} | fields)


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_nothing_is_computed_while_weights_are_exchanged(served, models, mode):
    start = {"version": "default", "path": str(models("llama")), "precision": "bf16"}
    assert served.client.get("/v1/policy").json() == start
    answer = publish(served, mode=mode)
    assert (answer.status_code, answer.json()) == (200, start | {"version": "2", "path": str(served.newer)})
    assert served.engine.calls == ["baton_open", f"pause {mode} True", "baton_swap", "reset", "resume"]
    assert served.client.get("/v1/policy").json() == answer.json()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"path": "/etc"}, 403, "is not below"),
        ({"path": "newer"}, 403, "is not below"),
        ({"version": ""}, 422, ""),
        ({"mode": "abort"}, 422, ""),
        ({"other": 1}, 422, ""),
        ({"path": None}, 422, ""),
        ({"broadcast": {"port": 9, "rank": 1, "ranks": 2, "tensors": []}}, 422, ""),  # beside a path
    ],
)
def test_what_is_not_taken_never_reaches_the_engine(served, fields, status, message):
    answer = publish(served, **fields)
    assert answer.status_code == status
    assert not message or message in answer.json()["error"]["message"]
    assert served.engine.calls == []


def test_a_directory_that_is_not_taken_never_reaches_the_engine(served):
    (served.newer / "model.safetensors").unlink()
    answer = publish(served)
    assert answer.status_code == answer.json()["error"]["code"] == 409
    assert "holds no model.safetensors" in answer.json()["error"]["message"]
    assert served.engine.calls == []
    assert served.client.get("/v1/policy").json()["version"] == "default"


def test_no_worker_exchanges_its_weights_where_another_cannot(served):
    served.engine.answers["baton_open"] = ["", "path x has changed"]
    answer = publish(served)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "path x has changed")
    assert served.engine.calls == ["baton_open"]


@pytest.mark.parametrize("fault", ["swap", "cache"])
def test_after_half_an_exchange_nothing_is_answered(served, fault):
    if fault == "swap":
        served.engine.answers["baton_swap"] = RuntimeError("out of memory")
    else:
        served.engine.reset = False
    answer = publish(served)
    assert answer.status_code == 500
    assert "the server ends" in answer.json()["error"]["message"]
    assert ("out of memory" if fault == "swap" else "prefix cache") in served.route.failed
    assert "resume" not in served.engine.calls
    assert served.ended == [True]
    assert served.client.get("/v1/policy").json()["version"] == "default"


@pytest.fixture
def weights(served):
    return {name: tensor * 2 for name, tensor in load_file(served.newer / "model.safetensors").items()}


def post(served):
    return lambda body: served.client.post("/v1/policy", json=body)


def test_a_broadcast_is_given_to_the_workers_to_the_bit(served, weights, monkeypatch):
    monkeypatch.setattr(weight_broadcast, "BUCKET", 10_000)  # some tensors in one, others over several
    answer = broadcast(weights, post(served))
    assert (answer.status_code, answer.json()) == (
        200,
        {"version": "sent", "path": "broadcast of 127.0.0.1", "precision": "bf16"},
    )
    assert served.engine.calls == ["baton_open", "pause wait True", "baton_swap", "reset", "resume"]
    (opened,) = served.engine.opened
    assert opened.keys() == weights.keys()
    assert all(torch.equal(opened[name], weights[name]) for name in weights)


def damaged(weights, fault):
    name = "model.norm.weight"
    changes = {
        "lacks": {},
        "shape": {name: weights[name][:-1]},
        "dtype": {name: weights[name].bfloat16()},
        "NaN": {name: weights[name] * float("nan")},
    }
    return {n: t for n, t in weights.items() if n != name} | changes[fault]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lacks", "the broadcast lacks model.norm.weight"),
        ("shape", "the broadcast: model.norm.weight is [63], the server's is [64]"),
        ("dtype", "the broadcast: model.norm.weight is BF16, the server's is F32"),
        ("NaN", "the broadcast: model.norm.weight has numbers that are NaN"),
    ],
)
def test_a_broadcast_that_is_not_taken_never_reaches_the_engine(served, weights, fault, message):
    answer = broadcast(damaged(weights, fault), post(served))
    assert answer.status_code == 409
    assert message in answer.json()["error"]["message"]
    assert served.engine.calls == []
    assert served.client.get("/v1/policy").json()["version"] == "default"


def test_a_trainer_that_dies_in_the_midst_leaves_the_weights(served, weights, monkeypatch):
    monkeypatch.setattr(weight_broadcast, "BUCKET", 10_000)
    answer = broadcast(weights, post(served), killed_after=5)
    assert answer.status_code == 424
    assert "the broadcast broke off: " in answer.json()["error"]["message"]
    assert served.engine.calls == []
    assert broadcast(weights, post(served)).status_code == 200  # the next one is taken


def test_a_sender_that_is_not_there_is_given_up(served, weights, monkeypatch):
    monkeypatch.setattr(weight_broadcast, "TIMEOUT", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        said = {"port": nobody.getsockname()[1], "rank": 1, "ranks": 2, "tensors": announced(weights)}
        assert post(served)({"version": "2", "broadcast": said}).status_code == 424
    assert served.engine.calls == []


def test_only_what_the_server_was_started_for_is_taken(served, weights):
    served.route._broadcasts = False
    answer = broadcast(weights, post(served))
    assert answer.status_code == 403
    assert "infer rollouts --broadcasts" in answer.json()["error"]["message"]
    served.route._folder = None
    answer = publish(served)
    assert answer.status_code == 403
    assert "start it with --policies" in answer.json()["error"]["message"]
