"""`rlhf --rollouts` against a server of `infer rollouts`: each in its own environment, one folder between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT, command

Baton = Callable[..., subprocess.CompletedProcess[str]]

CONFIG = {  # heads of 32, the smallest for which vLLM has attention on the CPU
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "vocab_size": 320,
}

# Floats in other orders: vLLM's kernels and transformers', both fp32.
GAP = 1e-5
TRAIN = (
    "--max-new-tokens 8 --global-batch-size 8 --micro-batch-size 8 --precision fp32 --save-every 1 --temperature 0.7 "
    "--learning-rate 1e-3"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rollouts")
    (place / "policies").mkdir()
    words = ("one", "two", "three", "four five")
    asked = [[{"role": "user", "content": f"{word} and"}] for word in words]
    (place / "prompts.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in asked))
    (place / "reward.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(text) / 10 for text in completions]\n"
    )
    return place


@pytest.fixture(scope="module")
def source(inputs: Path, baton: Baton) -> Path:
    """A random model in fp32: a policy is published in the dtype of its source."""
    words = ("one", "two", "three", "four", "five", "and", "then")
    lines = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(200)]
    (inputs / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (inputs / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = inputs / "tokenizer"
    baton("pretrain", "tokenizer", "--source", inputs / "text.jsonl", "--target", tokenizer, "--vocab-size", 320)
    init = ("--model-config", inputs / "config.json", "--tokenizer", tokenizer, "--dtype", "fp32")
    baton("convert", "init", *init, "--target", inputs / "hf")
    return inputs / "hf"


@pytest.fixture(scope="module")
def server(source: Path, inputs: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server, whose chat template is another than the trainer's."""
    served = shutil.copytree(source, inputs / "served", ignore=shutil.ignore_patterns("manifest.json"))
    (served / "chat_template.jinja").write_text("{% for m in messages %}of something else{% endfor %}")
    words = command("infer", "rollouts", "--source", served, "--policies", inputs / "policies", "--port", 0)
    words += ["--broadcasts"]
    words += ["--max-model-len", "64", "--batch-size", "16", "--precision", "fp32"]
    log = (inputs / "server.log").open("w")
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    assert running.stdout is not None
    ready = running.stdout.readline().split()
    assert ready[:1] == ["ready"], (inputs / "server.log").read_text()
    yield ready[1], running
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=60)


def flags(
    source: Path, inputs: Path, url: str, target: str, steps: int, *, broadcast: bool = False
) -> tuple[object, ...]:
    way = ("--publish-by", "broadcast") if broadcast else ("--policies", inputs / "policies")
    return (
        *(
            "--source",
            source,
            "--prompts",
            inputs / "prompts.jsonl",
            "--reward",
            f"py:{inputs / 'reward.py'}:short",
        ),
        *(
            "--target",
            inputs / target,
            "--rollouts",
            url,
            *way,
            "--steps",
            steps,
            *TRAIN.split(),
        ),
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ppo", ("--rollout-batch-size", 8)),
        ("grpo", ("--generations", 4)),
        ("rloo", ("--generations", 4, "--lora-rank", 4, "--zero", 2)),
    ],
)
def test_vllm_samples_from_the_policy_of_the_trainer(name, more, server, source, inputs, baton):
    """Prompts are messages, which the trainer renders: with the server's own template its log-probabilities would be others.

    RLOO trains an adapter on ZeRO-2, broadcasts the merged policy, and publishes the adapter for other tools.
    """
    url, _ = server
    baton("rlhf", name, *flags(source, inputs, url, name, 3, broadcast=name == "rloo"), *more)
    rows = [json.loads(line) for line in (inputs / name / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert max(row["log_prob_gap"] for row in rows) < GAP
    assert max(row["log_prob_gap_max"] for row in rows) < 10 * GAP
    assert list((inputs / "policies").iterdir()) == []
    if name == "rloo":
        merge_and_serve(source, inputs / "rloo", inputs / "rloo-merged", baton)


def merge_and_serve(source, adapter, merged, baton):
    """An adapter through `convert merge-lora`, PEFT in transformers, the check of `infer serve --adapter`."""
    baton("convert", "merge-lora", "--source", source, "--adapter", adapter, "--target", merged)
    said = json.loads(python("rlhf", ROOT / "tests/pipeline/adapter_of_a_policy.py", source, adapter, merged))
    assert said["adapted"] == 14
    assert said["bits"], "`rlhf --publish merged` and `convert merge-lora` differ"
    assert said["effect"] > 1e-3
    assert said["gap"] < 1e-5  # fp32: the adapter is added after the product, or before
    check = (
        "import sys; from pathlib import Path; from tools.infer.weight_check import ServedWeights as Served; "
        "from tools.infer.served_adapters import parse_adapters as parse; "
        "print(parse([f'tuned={sys.argv[2]}'], Served.read(Path(sys.argv[1])).shapes, 'base')[0].rank)"
    )
    assert python("infer", "-c", check, source, adapter).split()[-1] == "4"


def python(tool: str, *words: object) -> str:
    """What Python prints in a tool's environment."""
    interpreter = Path(command(tool)[0]).with_name("python")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [interpreter, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT
    ).stdout


def test_a_killed_server_is_named_within_a_minute(server, source, inputs, baton):
    """It dies in the midst of a run; the state of the last save is kept."""
    url, running = server
    state = inputs / "killed.state"
    with (inputs / "killed.log").open("w") as log:
        words = command("rlhf", "ppo", *flags(source, inputs, url, "killed", 500), "--rollout-batch-size", 8)
        trainer = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        until = time.monotonic() + 120
        while not list(state.glob("step_*/facts.json")) and time.monotonic() < until and trainer.poll() is None:
            time.sleep(0.1)
        running.kill()
        died = time.monotonic()
        assert trainer.wait(timeout=120) == 1
    assert time.monotonic() - died < 60
    said = (inputs / "killed.log").read_text().splitlines()
    assert f"--rollouts {url} has not answered for 30 s" in said[-1], said
    assert "the last saved state is kept" in said[-1]
    assert list(state.glob("step_*/facts.json"))
