"""What is published: the source's names and dtypes, the newest only, in a folder of the run."""

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import StageError, UserError
from tests.tools.rlhf.rollout.rollout_server import Policy
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.rollout.directory_publisher import DirectoryPublisher
from tools.rlhf.rollout.servers import Servers


@pytest.fixture
def place(world, server, tmp_path):
    initialize_distributed()
    servers = Servers(addresses=(server.url,), timeout=20.0)
    return tmp_path, tmp_path / "out", open_source(world.policy), servers


def test_the_newest_policy_is_kept_until_the_end(place, server):
    policies, _, source, _ = place
    policy = Policy(load_policy(source, torch.float64))
    stored = load_file(source.path / "model.safetensors")
    with DirectoryPublisher.open(*place) as publisher:
        for version in range(3):
            publisher.publish(policy, version)
            path, name = server.published[-1]
            assert name.endswith(f"-{version}")
            assert [p.name for p in policies.glob("out-*/*")] == [str(version)]
            written = load_file(f"{path}/model.safetensors")
            assert {n: (t.shape, t.dtype) for n, t in written.items()} == {
                n: (t.shape, t.dtype) for n, t in stored.items()
            }
            assert torch.equal(written["model.norm.weight"], policy.module.state_dict()["model.norm.weight"].float())
            with torch.no_grad():
                policy.module.model.norm.weight.mul_(2)
        assert publisher.wrong() == ""
    assert list(policies.iterdir()) == []
    with DirectoryPublisher.open(*place) as publisher:
        publisher.publish(policy, 2)
    assert server.published[-1][1] != name, "a policy of an earlier process has the name of this one's"


def test_a_server_with_other_weights_gets_the_policy_again(place, server):
    policy = Policy(load_policy(place[2], torch.float32))
    with DirectoryPublisher.open(*place) as publisher:
        publisher.publish(policy, 0)
        publisher.assure()  # it has them
        assert len(server.published) == 1
        for change in (server.restart, lambda: setattr(server, "version", "another-run-0")):
            change()
            assert "where 'out-" in publisher.wrong()
            publisher.assure()
            assert server.published[-1] == server.published[0]
            assert publisher.wrong() == ""
        assert len(server.published) == 3


def test_what_a_killed_process_left_is_removed(place):
    policies = place[0]
    with DirectoryPublisher.open(*place):
        (folder,) = policies.iterdir()
    (folder / "7").mkdir(parents=True)
    with DirectoryPublisher.open(*place):
        assert list(folder.iterdir()) == []


def test_a_tensor_that_is_missing_or_not_finite_stops_the_run(place, server):
    *_, source, _ = place
    policy = Policy(load_policy(source, torch.float32))
    whole = policy.full_weights()
    with DirectoryPublisher.open(*place) as publisher:
        policy.full_weights = lambda: {n: t for n, t in whole.items() if n != "model.norm.weight"}
        with pytest.raises(StageError, match="lacks model.norm.weight"):
            publisher.publish(policy, 0)
        policy.full_weights = lambda: whole | {"model.norm.weight": whole["model.norm.weight"] * float("nan")}
        with pytest.raises(StageError, match="model.norm.weight is not finite"):
            publisher.publish(policy, 1)
    assert [version[-2:] for _, version in server.published] == ["-0"]


def test_a_folder_that_cannot_be_written_is_named(place, tmp_path):
    _, target, source, servers = place
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="--policies .*file cannot be written"),
        DirectoryPublisher.open(tmp_path / "file", target, source, servers),
    ):
        raise AssertionError("not refused")
