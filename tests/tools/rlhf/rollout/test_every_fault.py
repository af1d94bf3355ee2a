"""`rlhf ppo|grpo|rloo --rollouts`: they learn as in process, and each fault is named within one step, with the state kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.runtime import progress
from tests.tools.rlhf.rollout.rollout_server import RolloutServer
from tools.rlhf.algorithms import losses
from tools.rlhf.rollout import server_publisher, servers

STEPS = 8
WEIGHTS = (
    "Importance correction: mean weight of a token",
    "Importance correction: tokens dropped and capped",
)  # charts


@pytest.fixture
def flags(world: Any, server: RolloutServer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "policies").mkdir()

    def make(command: str, **changes: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "source": world.policy, "prompts": world.prompts, "reward": world.reward("red"), "target": tmp_path / command,
            "steps": STEPS, "max_new_tokens": 12, "micro_batch_size": 8, "global_batch_size": 8, "save_every": 1,
            "rollouts": server.url, "policies": tmp_path / "policies", "rollout_timeout": 30, "learning_rate": 3e-3,
        }  # fmt: skip
        if command == "ppo":
            usual |= {"rollout_batch_size": 8, "kl_coefficient": 0.01}
        return usual | changes

    return make


@pytest.mark.parametrize("command", ["ppo", "grpo", "rloo"])
def test_a_learnable_reward_rises(command, flags, server, second, world, rlhf, metrics, sampled_red, capsys):
    """RLOO's reward, which rises slower, is sampled in `test_rloo.py`; here two servers are sent it."""
    steps = 2 if command == "rloo" else STEPS
    given = flags(command, steps=steps, global_batch_size=32, micro_batch_size=32)
    if command == "ppo":
        given |= {"rollout_batch_size": 32, "global_batch_size": 16, "micro_batch_size": 16}
    if command == "grpo":
        given |= {"importance_correction": "token_truncate"}
    policies, servers_of_run = given["policies"], [server]
    if command == "rloo":
        servers_of_run.append(second)
        given |= {"publish_by": "broadcast", "rollouts": f"{server.url},{second.url}"}
        del given["policies"]
    phases: list[str] = []
    progress.listen(phases.append)
    assert rlhf(command, **given) == 0
    progress.listen(None)
    last = ["forward", "update"] if command == "ppo" else ["forward and backward"]
    update = ["reading the data", "roll-out", "rewards", *last, "recording and saving"]
    assert phases == ["reading and loading", *update * steps]
    rows = metrics(given["target"])
    assert len(rows) == steps
    rewards = [row["reward"] for row in rows]
    if command != "rloo":
        assert sum(rewards[-3:]) / 3 > 2 * sum(rewards[:2]) / 2
        assert sampled_red(given["target"]) > 2 * sampled_red(world.policy)
    assert max(row["log_prob_gap"] for row in rows) < 1e-5  # float32, with and without a cache
    assert all(0.99 < row["importance_ratio_min"] <= 1 <= row["importance_ratio_max"] < 1.01 for row in rows)
    assert max(row["sampler_kl"] for row in rows) < 1e-6
    for each in servers_of_run:
        assert [version.rsplit("-", 1)[1] for _, version in each.published] == [str(step) for step in range(steps)]
        assert {path == "broadcast" for path, _ in each.published} == {command == "rloo"}
        assert len(each.requests) == steps * 32 // len(servers_of_run)
    assert len({request["seed"] for each in servers_of_run for request in each.requests}) == steps * 32
    assert list(policies.iterdir()) == []
    assert f"roll-outs {given['rollouts'].replace(',', ', ')} in fp32" in capsys.readouterr().err
    page = (given["target"] / "report.html").read_text()
    drawn = {title: title in page for title in ("Clipped", *WEIGHTS)}
    assert drawn == {"Clipped": True, **dict.fromkeys(WEIGHTS, command == "grpo")}


def fail_at(server: RolloutServer, step: int, fault: Callable[[], None]) -> None:
    """`fault` at the first request of a step's roll-out."""

    def before(body: dict[str, Any]) -> None:
        if server.version.endswith(f"-{step}"):
            fault()

    server.before = before


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_stale_weights_are_named_within_one_step(command, flags, server, rlhf, metrics, capsys):
    """The server says that it has taken a policy over, and goes on with the one before."""
    given = flags(command, steps=4)
    fail_at(server, 1, lambda: setattr(server, "lies", True))
    assert rlhf(command, **given) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the sampler has other weights than the trainer" in said
    assert [version[-2:] for _, version in server.published] == ["-0", "-1", "-2"]
    server.lies, server.before = False, lambda body: None
    assert rlhf(command, **given) == 0
    assert len(metrics(given["target"])) == 4


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_a_dead_engine_is_named_and_the_run_resumes_to_the_same_digits(
    command, flags, server, rlhf, metrics, capsys, impatient, tmp_path, monkeypatch
):
    """The server wants a key. PPO's run has the flags that no other test sets."""
    server.key = "secret"
    (tmp_path / "key").write_text("secret\n")
    more = {"rollout_key_file": tmp_path / "key", "log_every": 3}
    if command == "ppo":
        more |= {"warmup_steps": 2, "missing_eos_penalty": 0.5, "kl_estimator": "k3"}
    given = flags(command, steps=4, **more)
    died: list[float] = []

    def die() -> None:
        server.failing = 500
        died.append(time.monotonic())

    fail_at(server, 2, die)
    assert rlhf(command, **given) == 1
    assert time.monotonic() - died[0] < 60
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--rollouts {server.url} has not answered for" in last
    assert "the engine died" in last
    assert not given["target"].exists()
    saved = {"ppo": "step_0000002/facts.json", "grpo": "trainer/checkpoint-2/complete"}[command]
    assert (given["target"].with_name(f"{command}.state") / saved).is_file()
    server.failing, server.before = None, lambda body: None
    assert rlhf(command, **given) == 0
    capsys.readouterr()
    penalised: list[tuple[Any, Any, Any]] = []
    token_rewards = losses.token_rewards

    def watched(scores: Any, kl: Any, mask: Any, *rest: Any) -> Any:
        penalised.append((scores, kl, mask))
        return token_rewards(scores, kl, mask, *rest)

    monkeypatch.setattr(losses, "token_rewards", watched)
    whole = given | {"target": given["target"].with_name("whole")}
    assert rlhf(command, **whole) == 0
    rows = metrics(whole["target"])
    assert metrics(given["target"]) == rows
    assert re.findall(r"^(?:iteration|update) (\d)/4:", capsys.readouterr().err, re.MULTILINE) == ["3", "4"]
    if command == "ppo":
        assert [row["learning_rate"] for row in rows] == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])
        for (scores, kl, mask), row in zip(penalised, rows, strict=True):
            assert scores.mean().item() == pytest.approx(row["reward"] - 0.5 * (1 - row["ended"]), abs=1e-6)
            assert (kl * mask).min() > -1e-6  # rounding; k1 is far below for some tokens
        assert min(row["ended"] for row in rows) < 1
        assert rows[-1]["kl_reply"] > 0


@pytest.mark.parametrize("command", ["ppo", "rloo"])
def test_a_tensor_that_is_not_published_is_named(command, flags, server, rlhf, monkeypatch, capsys):
    complete = server_publisher.source_weights

    def lacking(*arguments: Any) -> dict[str, Any]:
        weights = complete(*arguments)
        if server.version.endswith("-0"):
            del weights["model.norm.weight"]
        return weights

    monkeypatch.setattr(server_publisher, "source_weights", lacking)
    assert rlhf(command, **flags(command, steps=2)) == 1
    assert "lacks model.norm.weight" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert rlhf(command, **flags(command, steps=2)) == 0


def test_a_publication_that_is_lost_is_made_up_for(flags, server, rlhf, metrics, monkeypatch):
    """The version is asked for before every roll-out."""
    publish, lost = servers.Servers.publish, []

    def losing(self: Any, path: Path, version: str, *, to: Any) -> None:
        if version.endswith("-1") and not lost:
            lost.append(version)
        else:
            publish(self, path, version, to=to)

    monkeypatch.setattr(servers.Servers, "publish", losing)
    given = flags("grpo", steps=3)
    assert rlhf("grpo", **given) == 0
    assert lost
    assert [version[-2:] for _, version in server.published] == ["-0", "-1", "-2"]
    assert max(row["log_prob_gap"] for row in metrics(given["target"])) < 1e-5


def test_a_sampler_of_another_temperature_is_named_before_the_first_update(flags, server, rlhf, capsys):
    server.before = lambda body: body.update(temperature=0.5)
    assert rlhf("grpo", **flags("grpo")) == 1
    assert "before the first update" in capsys.readouterr().err.splitlines()[-1]


def test_prompts_are_token_ids(flags, server, rlhf, world):
    """The server renders nothing. `tests/pipeline/test_end_to_end_rollouts.py` has a server of another chat template."""
    assert rlhf("ppo", **flags("ppo", steps=1)) == 0
    ids = {tuple(request["prompt"]) for request in server.requests}
    assert all(isinstance(token, int) for prompt in ids for token in prompt)


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("ppo", "broken", "division by zero"),
        ("grpo", "not_finite", "nan"),
        ("ppo", "wrong_count", "1 "),
        ("grpo", "stalls", "--reward-timeout"),
    ],
)
def test_a_faulty_reward_ends_the_run(command, name, message, flags, rlhf, world, tmp_path, capsys):
    """At its second call, so that there is a state to resume from."""
    file = tmp_path / "faulty.py"
    source = world.rewards.read_text() + (
        "\nimport time\ncount = 0\n"
        "def stalls(prompts, completions, **columns):\n    time.sleep(30)\n"
        f"def late(prompts, completions, **columns):\n    global count\n    count += 1\n"
        f"    broke = count == 2 and not Path({str(tmp_path / 'mended')!r}).exists()\n"
        f"    return ({name} if broke else red)(prompts, completions, **columns)\n"
    )
    file.write_text(source)
    given = flags(command, steps=3, reward=f"py:{file}:late", reward_timeout=2)
    assert rlhf(command, **given) == 1
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1].lower(), said
    assert "late" in said.splitlines()[-1]
    (tmp_path / "mended").touch()
    assert rlhf(command, **given) == 0
    assert "resuming after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": "localhost:8000"}, "is not an address such as"),
        ({"rollouts": "http://localhost:99999"}, "is not an address such as"),
        ({"policies": None}, "--rollouts needs --policies"),
        ({"rollouts": None}, "--policies is for servers"),
        ({"publish_by": "broadcast"}, "--publish-by broadcast writes no policy: leave --policies out"),
        ({"publish_by": "broadcast", "policies": None, "rollouts": None}, "--publish-by is for servers"),
        ({"rollout_micro_batch_size": 4}, "--rollout-micro-batch-size: servers of --rollouts batch by themselves"),
        ({"importance_cap": 3.0}, "--importance-cap 3 acts with --importance-correction"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(changes, message, flags, rlhf, capsys):
    given = {name: value for name, value in flags("ppo", **changes).items() if value is not None}
    assert rlhf("ppo", **given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not given["target"].with_name("ppo.state").exists()


def test_a_server_that_is_not_there_is_a_mistake_in_the_command(flags, rlhf, capsys, impatient):
    assert rlhf("grpo", **flags("grpo", rollouts="http://127.0.0.1:9")) == 2
    said = capsys.readouterr().err
    assert "--rollouts http://127.0.0.1:9 has not answered" in said
    assert said.count("\n") == 1
