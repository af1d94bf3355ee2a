"""A server of roll-outs and its trainer in two containers, one volume between them. Runs where both images are."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import LOCKED, USER, Done, shell

CONFIG = {  # heads of 32, the smallest for which vLLM has attention on the CPU
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 512,
}
IMAGES = ("infer:latest", "rlhf:latest")
SANDBOX = LOCKED[: LOCKED.index("--network")] + LOCKED[LOCKED.index("--network") + 2 :]


@pytest.fixture
def network(engine: None) -> Iterator[str]:
    """A network that has no way out; its containers go with it."""
    for image in IMAGES:
        if shell("docker", "image", "inspect", image, code=None).returncode:
            pytest.skip(f"{image} is not here: make image-{image.partition(':')[0]}")
    name = f"baton-test-{uuid.uuid4().hex[:8]}"
    shell("docker", "network", "create", "--internal", name)
    yield name
    shell("docker", "rm", "--force", f"{name}-sampler", code=None)
    shell("docker", "network", "rm", name)


@pytest.fixture
def inputs(work: Path, native: Callable[..., Done]) -> Path:
    """The caller's model, prompts and reward, and the folder of policies."""
    (work / "text").mkdir()
    (work / "text" / "one.txt").write_text("\n".join(f"{a} and {b} then" for a in range(40) for b in range(40)))
    (work / "config.json").write_text(json.dumps(CONFIG))
    native("pretrain", "tokenizer", "--source", work / "text", "--target", work / "tokenizer", "--vocab-size", 512)
    init = ("--model-config", work / "config.json", "--tokenizer", work / "tokenizer", "--dtype", "fp32")
    native("convert", "init", *init, "--target", work / "hf")
    (work / "policies").mkdir()
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n} and"}) + "\n" for n in range(8)))
    (work / "rewards.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(text) / 10 for text in completions]\n"
    )
    for path in (work, *work.rglob("*")):
        os.chown(path, USER, USER)
    return work


def test_the_server_takes_each_policy_from_the_volume_of_the_trainer(
    inputs: Path, network: str, inspect: Callable[[str], dict[str, Any]]
) -> None:
    sampler = f"{network}-sampler"
    common = ("--network", network, "--volume", f"{inputs}:/data", *SANDBOX)
    serve = ("rollouts", "--source", "/data/hf", "--policies", "/data/policies", "--host", "0.0.0.0")
    sizes = ("--precision", "fp32", "--max-model-len", 64, "--batch-size", 16)
    shell("docker", "run", "--detach", "--name", sampler, "--shm-size", "1g", *common, IMAGES[0], *serve, *sizes)
    until = time.monotonic() + 400
    while shell("docker", "inspect", "--format", "{{.State.Health.Status}}", sampler).stdout.strip() != "healthy":
        assert time.monotonic() < until, shell("docker", "logs", sampler).stderr
        time.sleep(1)
    train = (
        "grpo",
        "--source",
        "/data/hf",
        "--prompts",
        "/data/prompts.jsonl",
        "--reward",
        "py:/data/rewards.py:short",
    )
    sizes = ("--steps", 3, "--generations", 4, "--global-batch-size", 8, "--micro-batch-size", 8, "--max-new-tokens", 8)
    way = ("--rollouts", f"http://{sampler}:8000/v1", "--policies", "/data/policies", "--precision", "fp32")
    more = ("--learning-rate", "1e-3", "--target", "/data/grpo")
    shell("docker", "run", "--rm", *common, IMAGES[1], *train, *sizes, *way, *more)
    rows = [json.loads(line) for line in (inputs / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert max(row["log_prob_gap"] for row in rows) < 1e-5  # the server has each new policy; fp32 on both sides
    assert list((inputs / "policies").iterdir()) == []
    assert {path.stat().st_uid for path in inputs.rglob("*")} == {USER}
