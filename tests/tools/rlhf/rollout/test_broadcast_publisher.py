"""The policy as a broadcast: what servers hold afterwards, and what each fault of one of them does to the others."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import StageError
from shared.runtime import weight_broadcast
from tests.tools.rlhf.rollout.rollout_server import Policy, serving
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.rollout import server_publisher
from tools.rlhf.rollout.broadcast_publisher import BroadcastPublisher
from tools.rlhf.rollout.servers import Servers


@pytest.fixture
def two(world, server, monkeypatch):
    """Two servers, the publisher to both, and a policy that differs from theirs."""
    initialize_distributed()
    monkeypatch.setattr(weight_broadcast, "BUCKET", 100_000)  # the policy takes several
    monkeypatch.setattr(weight_broadcast, "TIMEOUT", 2.0)
    source = open_source(world.policy)
    policy = Policy(load_policy(source, torch.float32))
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.1)
    with serving(world.policy) as second:
        servers = Servers(addresses=(server.url, second.url), timeout=20.0)
        yield (server, second), BroadcastPublisher("run", source, servers), policy


def holds(server: Any, weights: dict[str, torch.Tensor]) -> bool:
    found = server.model.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_every_server_has_the_weights_to_the_bit_also_after_a_restart(world, two):
    servers, publisher, policy = two
    publisher.publish(policy, 4)
    wanted = policy.full_weights()
    assert all(holds(server, wanted) and server.version.endswith("-4") for server in servers)
    publisher.assure()
    servers[1].restart()
    assert holds(servers[1], load_file(world.policy / "model.safetensors"))
    assert servers[1].url in publisher.wrong()
    publisher.assure()
    assert publisher.wrong() == ""
    assert holds(servers[1], wanted)
    assert [len(server.published) for server in servers] == [1, 2]


def unchanged(world, servers) -> bool:
    first = load_file(world.policy / "model.safetensors")
    return all(holds(server, first) and server.version == "default" for server in servers)


def test_a_tensor_that_is_missing_is_refused_by_name(world, two, monkeypatch):
    servers, publisher, policy = two
    complete = server_publisher.source_weights

    def lacking(*arguments):
        return {name: tensor for name, tensor in complete(*arguments).items() if name != "model.norm.weight"}

    monkeypatch.setattr(server_publisher, "source_weights", lacking)
    with pytest.raises(StageError, match="the broadcast lacks model.norm.weight"):
        publisher.publish(policy, 0)
    assert unchanged(world, servers)


def test_the_server_that_dies_is_named_and_the_other_keeps_its_weights(world, two):
    servers, publisher, policy = two

    def die():
        raise ConnectionError

    servers[1].receiving = die
    with pytest.raises(StageError, match=f"--rollouts {servers[1].url} went away while it was given the policy"):
        publisher.publish(policy, 0)
    assert unchanged(world, servers)
    servers[1].receiving = lambda: None
    publisher.publish(policy, 0)
    assert publisher.wrong() == ""


def test_the_server_that_hangs_is_named(world, two, impatient):
    servers, publisher, policy = two
    wake = threading.Event()

    def hang():
        servers[1].dumb = True
        wake.wait(30)

    servers[1].receiving = hang
    since = time.monotonic()
    with pytest.raises(StageError, match=f"--rollouts {servers[1].url} has not answered for"):
        publisher.publish(policy, 0)
    assert time.monotonic() - since < 20
    servers[1].dumb = False
    wake.set()
    assert unchanged(world, servers)


def test_a_server_that_refuses_does_not_keep_the_other_waiting(world, two, monkeypatch):
    servers, publisher, policy = two
    monkeypatch.setattr(weight_broadcast, "TIMEOUT", 60.0)
    servers[1].failing = 409
    since = time.monotonic()
    with pytest.raises(StageError, match="the engine died"):
        publisher.servers.broadcast(policy.full_weights(), "1", to=publisher.servers.addresses)
    assert time.monotonic() - since < 20
    assert unchanged(world, servers)
