"""`--publish-by adapter`: each version under its own name, never replies of another, each fault named with the state kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.errors import UserError
from tests.tools.rlhf.rollout.adapter_server import AdapterServer
from tests.tools.rlhf.rollout.rollout_server import serving
from tools.rlhf import lora
from tools.rlhf.rollout.adapter_publisher import checked_base

STEPS = 3


@pytest.fixture
def loads(world: Any) -> Iterator[AdapterServer]:
    with serving(world.policy, AdapterServer) as running:
        yield running


@pytest.fixture
def flags(world: Any, loads: AdapterServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "policies").mkdir()

    def make(command: str = "grpo", **changes: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "source": world.policy, "prompts": world.prompts, "reward": world.reward("red"), "target": tmp_path / command,
            "steps": STEPS, "max_new_tokens": 8, "micro_batch_size": 8, "global_batch_size": 8, "save_every": 1,
            "rollouts": loads.url, "policies": tmp_path / "policies", "rollout_timeout": 30, "learning_rate": 1e-2,
            "lora_rank": 4, "publish_by": "adapter",
        }  # fmt: skip
        if command == "ppo":
            usual |= {"rollout_batch_size": 8, "kl_coefficient": 0.01}
        return {name: value for name, value in (usual | changes).items() if value is not None}

    return make


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_each_roll_out_is_of_the_adapter_of_its_name(command, flags, loads, world, rlhf, metrics, capsys):
    given = flags(command)
    assert rlhf(command, **given) == 0
    rows = metrics(given["target"])
    assert len(rows) == STEPS
    assert max(row["log_prob_gap"] for row in rows) < 1e-5  # float32, with and without a cache
    versions = [version for _, version in loads.published]
    assert [version.rsplit("-", 1)[1] for version in versions] == [str(step) for step in range(STEPS)]
    asked = [request["model"] for request in loads.requests]
    assert asked == [version for version in versions for _ in range(8)]
    assert [stamp.version for stamp in loads.stamps] == versions
    assert {stamp.base for stamp in loads.stamps} == {weights_digest(world.policy)}
    assert list(given["policies"].iterdir()) == []
    assert f"roll-outs {loads.url} in fp32, adapters by way of {given['policies']}" in capsys.readouterr().err


def test_a_server_that_is_restarted_in_a_roll_out_is_given_the_adapter_again(flags, loads, rlhf, metrics):
    """Its 404 of the version's name is no end, and no reply of the model without adapter is kept: the gap would show it."""
    restarted: list[int] = []

    def restart(body: dict[str, Any]) -> None:
        if loads.version.endswith("-2") and len(loads.requests) % 8 == 4 and not restarted:
            restarted.append(len(loads.requests))
            loads.restart()

    loads.before = restart
    given = flags(learning_rate=0.1)
    assert rlhf("grpo", **given) == 0
    assert restarted
    assert [version[-2:] for _, version in loads.published] == ["-0", "-1", "-2", "-2"]
    rows = metrics(given["target"])
    assert len(rows) == STEPS
    assert max(row["log_prob_gap"] for row in rows) < 1e-5


def lacking(monkeypatch: pytest.MonkeyPatch, loads: AdapterServer) -> None:
    complete = lora.Adapters.tensors

    def tensors(self: Any, *words: Any) -> dict[str, Any]:
        found = complete(self, *words)
        return dict(list(found.items())[1:]) if loads.version.endswith("-0") else found

    monkeypatch.setattr(lora.Adapters, "tensors", tensors)


def stale(monkeypatch: pytest.MonkeyPatch, loads: AdapterServer) -> None:
    def lie(body: dict[str, Any]) -> None:
        loads.lies = loads.version.endswith("-0")

    loads.before = lie


def another_version(monkeypatch: pytest.MonkeyPatch, loads: AdapterServer) -> None:
    def answer(choice: dict[str, Any]) -> None:
        if loads.version.endswith("-1"):
            loads.named = loads.published[0][1]

    loads.answer = answer


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lacking, "lora_A.weight; the last saved state is kept"),
        (stale, "the sampler has other weights than the trainer"),
        (another_version, "-0, and was asked for "),
    ],
)
def test_a_fault_is_named_within_one_step_and_the_run_resumes(
    fault, message, flags, loads, rlhf, metrics, monkeypatch, capsys
):
    given = flags(learning_rate=0.1)
    fault(monkeypatch, loads)
    assert rlhf("grpo", **given) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert [version[-2:] for _, version in loads.published][-1] in ("-1", "-2")
    monkeypatch.undo()
    loads.lies, loads.named = False, None
    loads.before = loads.answer = lambda body: None
    assert rlhf("grpo", **given) == 0
    assert "resuming after" in capsys.readouterr().err
    assert len(metrics(given["target"])) == STEPS


@pytest.mark.parametrize(
    ("changes", "server", "message"),
    [
        ({"lora_rank": None}, {}, "--publish-by adapter publishes the adapter that is trained: give --lora-rank"),
        ({"policies": None}, {}, "--rollouts needs --policies"),
        ({"rollouts": None, "policies": None}, {}, "--publish-by is for servers"),
        ({}, {"lora_rank": 0}, "has no room for adapters; start `infer rollouts` with --lora-rank 4 or more"),
        ({"lora_rank": 16}, {}, "has room for adapters of rank 8; start `infer rollouts` with --lora-rank 16 or more"),
        ({}, {"base": "0" * 32}, "has other weights than --source"),
        ({"publish_by": None}, {}, "takes adapters alone: give --publish-by adapter"),
        ({"publish_by": "broadcast", "policies": None}, {}, "takes adapters alone: give --publish-by adapter"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(changes, server, message, flags, loads, rlhf, capsys):
    for name, value in server.items():
        setattr(loads, name, value)
    given = flags(**changes)
    assert rlhf("grpo", **given) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert loads.published == []
    assert not list(given.get("policies", given["target"].parent / "policies").iterdir())


def test_adapters_of_stacked_experts_are_refused_by_name():
    """vLLM loads none: before the source is read, and whatever the servers say."""
    adapters = SimpleNamespace(stacked=("model.layers.0.mlp.experts.down_proj",), settings=SimpleNamespace(rank=4))
    with pytest.raises(UserError, match=r"stacked experts \(model.layers.0.mlp.experts.down_proj\); leave them out of"):
        checked_base([], [], adapters)
