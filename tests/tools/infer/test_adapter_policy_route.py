"""`/v1/policy` of adapters with an engine that notes its calls. With vLLM's: test_rollouts.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from shared.checkpoint.formats.weights_digest import weights_digest
from tests.tools.infer.adapters import make_adapter
from tools.infer.adapter_policy_route import AdapterPolicyRoute
from tools.infer.policy_adapters import PolicyAdapters
from tools.infer.weight_check import ServedWeights


class Engine:
    """The methods of `AsyncLLM` and of vLLM's models that an exchange calls."""

    model_config = SimpleNamespace(dtype=torch.bfloat16)
    errored = False

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.known, self.refuses = "default", ""
        self.lora_requests: dict[str, SimpleNamespace] = {}

    async def pause_generation(self, *, mode, clear_cache):
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self):
        self.calls.append("resume")

    async def load_lora_adapter(self, asked):
        self.calls.append(f"load {asked.lora_name}")
        if self.refuses:
            return SimpleNamespace(error=SimpleNamespace(message=self.refuses, code=500))
        self.lora_requests[asked.lora_name] = SimpleNamespace(lora_int_id=len(self.calls), path=asked.lora_path)
        return "Success"

    async def unload_lora_adapter(self, asked):
        self.calls.append(f"unload {asked.lora_name}")
        self.gone = self.lora_requests.pop(asked.lora_name)
        return "Success"

    async def remove_lora(self, number):
        assert number == self.gone.lora_int_id
        self.calls.append(f"remove {self.known}")

    async def update_weight_version(self, version):
        self.known = version

    async def get_weight_version(self):
        return self.known


@pytest.fixture
def served(models, tmp_path):
    base = models("llama")
    folder, copies = tmp_path / "policies", tmp_path / "copies"
    folder.mkdir()
    copies.mkdir()
    shapes = ServedWeights.read(base).shapes
    engine, app = Engine(), FastAPI()
    adapters = PolicyAdapters(base=weights_digest(base), shapes=shapes, rank=8, modules=None, fused={})
    route = AdapterPolicyRoute(adapters, folder, engine, source=base, name="policy", copies=copies)
    app.include_router(route.router)
    app.state.openai_serving_models = engine
    for version in "123":
        make_adapter(folder / version, base, version=version, seed=int(version))
    return SimpleNamespace(client=TestClient(app), engine=engine, folder=folder, copies=copies)


def publish(served, name, **fields):
    body = {"adapter": str(served.folder / name), "version": name} | fields
    return served.client.post("/v1/policy", json={name: value for name, value in body.items() if value is not None})


def test_the_one_before_is_unloaded_while_nothing_is_computed(served):
    for before, version in ((None, "1"), ("1", "2"), ("2", "3")):
        served.engine.calls.clear()
        answer = publish(served, version)
        assert answer.status_code == 200
        assert (answer.json()["version"], answer.json()["model"], answer.json()["precision"]) == (
            version,
            version,
            "bf16",
        )
        after = [f"unload {before}", f"remove {before}"] if before else []
        assert served.engine.calls == ["pause wait True", f"load {version}", *after, "resume"]
        assert served.client.get("/v1/policy").json() == answer.json()
        (loaded,) = served.engine.lora_requests.values()
        assert loaded.path.startswith(f"{served.copies}/")
    assert len(list(served.copies.iterdir())) == 2, "late requests for the one before"


def test_a_publication_that_is_repeated_changes_nothing(served):
    first = publish(served, "1").json()
    served.engine.calls.clear()
    assert publish(served, "1").json() == first
    answer = publish(served, "1", adapter=str(served.folder / "2"))
    assert (answer.status_code, "is of version 2" in answer.json()["error"]["message"]) == (409, True)
    assert served.engine.calls == []
    assert len(list(served.copies.iterdir())) == 1


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"adapter": "/etc"}, 403, "is not below"),
        ({"adapter": None, "path": "/policies/1"}, 403, "takes adapters alone"),
        ({"mode": "keep"}, 409, "requests in flight end with the adapter"),
        ({"version": "2"}, 409, "is of version 1, and was published as 2"),
        ({"version": ""}, 422, ""),
        ({"path": "/policies/1"}, 422, ""),
    ],
)
def test_what_is_not_taken_never_reaches_the_engine(served, fields, status, message):
    answer = publish(served, "1", **fields)
    assert answer.status_code == status
    assert not message or message in answer.json()["error"]["message"]
    assert served.engine.calls == []
    assert served.client.get("/v1/policy").json()["version"] == "default"
    assert list(served.copies.iterdir()) == []


@pytest.mark.parametrize(("errored", "status"), [(False, 409), (True, 500)])
def test_where_vllm_refuses_the_old_adapter_goes_on(served, errored, status):
    publish(served, "1")
    served.engine.calls.clear()
    served.engine.refuses, served.engine.errored = "no such module", errored
    answer = publish(served, "2")
    assert answer.status_code == status
    assert answer.json()["error"]["message"].endswith("no such module")
    assert served.engine.calls == ["pause wait True", "load 2", "resume"]
    assert [*served.engine.lora_requests] == ["1"]
    assert served.client.get("/v1/policy").json()["version"] == "1"
    assert len(list(served.copies.iterdir())) == 1
