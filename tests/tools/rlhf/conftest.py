"""A tiny policy of colour words, learnable rewards, and runs shared by the tests."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine wait for each other

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "brown", "black", "white", "pink")
REWARDS = '''
import os, signal, sys
from pathlib import Path

def red(prompts, completions, **columns):
    return [text.split().count("red") / max(1, len(text.split())) for text in completions]

calls = 0

def disturbed(prompts, completions, disturbance, **columns):
    """As red; at its third call sends this process the signal that the file named by the column asks for, once."""
    global calls
    calls += 1
    order = Path(disturbance[0])
    if calls == 3 and order.exists():
        number = int(order.read_text())
        order.unlink()
        os.kill(os.getpid(), number)
    return red(prompts, completions)

def wrong_count(prompts, completions, **columns):
    return [1.0]

def not_finite(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def broken(prompts, completions, **columns):
    return 1 / 0

def leaves(prompts, completions, **columns):
    sys.exit()
'''


class World:
    """Files of the tests: policy, prompts, preference pairs, reward functions."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.policy = root / "policy"
        self.prompts = root / "prompts.jsonl"
        self.pairs = root / "pairs.jsonl"
        self.order = root / "order"
        self.rewards = root / "rewards.py"

    def reward(self, name: str) -> str:
        return f"py:{self.rewards}:{name}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> World:
    """Train the policy, write the files."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    world = World(root)
    chance = random.Random(0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(set("".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" az:\n")[0][0])))
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator([f"colors: {' '.join(COLOURS)} user assistant system |<>"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "colors:{% for m in messages %} {{ m['content'] }}{% endfor %}"

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):  # uniform over colours, EOS after twelve
        texts = ["colors:" + "".join(f" {chance.choice(COLOURS)}" for _ in range(12)) for _ in range(32)]
        ids = [tokenizer(text)["input_ids"] + [1] for text in texts]
        longest = max(map(len, ids))
        batch = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(eos_token_id=1, pad_token_id=0, temperature=0.5, do_sample=True)
    model.save_pretrained(world.policy)
    tokenizer.save_pretrained(world.policy)

    world.rewards.write_text(REWARDS)
    starts = [
        "colors:" + "".join(f" {word}" for word in chance.sample(COLOURS, n)) for n in (0, 1, 2) for _ in range(16)
    ]
    world.prompts.write_text("".join(json.dumps({"prompt": s, "disturbance": str(world.order)}) + "\n" for s in starts))
    rows = []
    for _ in range(240):
        rejected = [chance.choice(COLOURS[1:]) for _ in range(8)]
        chosen = list(rejected)
        for place in chance.sample(range(8), 3):
            chosen[place] = "red"
        texts = {"chosen": "".join(f" {w}" for w in chosen), "rejected": "".join(f" {w}" for w in rejected)}
        rows.append({"prompt": "colors:", **texts})
    world.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


@pytest.fixture(scope="session")
def rlhf() -> Callable[..., int]:
    """Run a command line in this process; returns its exit code."""
    from tools.rlhf.cli import tool

    def run(command: str, **flags: Any) -> int:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with pytest.raises(SystemExit) as end:
            tool.run([command, *words])
        return int(end.value.code or 0)

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line in a process of its own."""

    def run(command: str, **flags: Any) -> subprocess.CompletedProcess[str]:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        job = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        # Libraries set the variables of a job in the environment; the new process is not part of it.
        environment = {name: value for name, value in os.environ.items() if name not in job}
        script = Path(sys.executable).with_name("rlhf")
        return subprocess.run([script, command, *words], capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, float]]]:
    """The rows of a run's metrics.jsonl, without times and memory."""

    def rows(target: Path) -> list[dict[str, float]]:
        lines = (target / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "memory", "time", "runtime", "per_second")
        return [{k: v for k, v in json.loads(line).items() if not any(word in k for word in timed)} for line in lines]

    return rows


@pytest.fixture(scope="session")
def reward_model(world: World, rlhf: Callable[..., int]) -> Path:
    """What `rlhf reward` makes of the pairs, at `world.root / "reward"`."""
    target = world.root / "reward"
    assert rlhf("reward", source=world.policy, data=world.pairs, target=target, epochs=2, learning_rate=1e-3) == 0
    return target


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process SIGUSR1 after an update of a TRL trainer, once."""
    from tools.rlhf.engines import trl

    def at(update: int) -> None:
        whole = trl.StageCallback.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == update:
                os.kill(os.getpid(), signal.SIGUSR1)
                monkeypatch.undo()
            return whole(self, args, state, control, **kwargs)

        monkeypatch.setattr(trl.StageCallback, "on_step_end", on_step_end)

    return at


@pytest.fixture
def trainers() -> Iterator[list[Any]]:
    """TRL's trainers of the commands that a test runs, before they train."""
    from tools.rlhf.algorithms import group_training, preference_training, reward
    from tools.rlhf.engines import trl

    made: list[Any] = []

    def train(trainer: Any, *rest: Any) -> int:
        made.append(trainer)
        return trl.train(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for module in (group_training, preference_training, reward):
            patch.setattr(module, "train", train)
        yield made


@pytest.fixture
def recomputed() -> Iterator[list[int]]:
    """For each model that TRL's trainers are given with `--gradient-checkpointing`: its layers that are computed again."""
    from tools.rlhf.algorithms import group_training, preference_training, reward
    from tools.rlhf.engines import recomputed_layers

    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (group_training, preference_training, reward):
            patch.setattr(
                module, "recompute_layers", lambda model: counts.append(recomputed_layers.recompute_layers(model))
            )
        yield counts


@pytest.fixture(scope="session")
def load_exactly() -> Callable[..., Any]:
    """Load a directory with an Auto class; its keys must be the model's."""

    def load(kind: Any, directory: Path) -> Any:
        model, info = kind.from_pretrained(directory, output_loading_info=True, local_files_only=True)
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        assert not info["mismatched_keys"], info
        return model

    return load


@pytest.fixture
def unmoved(world: World) -> Callable[[Path], dict[str, Any]]:
    """Check that a directory has the policy's weights, to the bit. Returns them."""

    def weights(directory: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        before, after = (load_file(place / "model.safetensors") for place in (world.policy, directory))
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)
        return before

    return weights


@pytest.fixture(scope="session")
def sampled_red(world: World) -> Callable[[Path], float]:
    """Mean share of the word "red" in replies that plain transformers samples from a directory."""

    return lambda directory: sampled(world, directory)


def sampled(world: World, directory: Path) -> float:
    """See `sampled_red`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory)
    texts = [json.loads(line)["prompt"] for line in world.prompts.read_text().splitlines()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=16)
    replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(r.split().count("red") / max(1, len(r.split())) for r in replies) / len(replies)
