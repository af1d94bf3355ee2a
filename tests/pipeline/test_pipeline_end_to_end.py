"""The whole pipeline on a model of a few thousand parameters: every stage is a command on directories."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
TRAIN = ("--global-batch-size", 8, "--micro-batch-size", 8, "--precision", "fp32", "--learning-rate", 3e-3)
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, conversations, preferences and prompts, as a user brings them."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "text").mkdir()
    words = ["red", "green", "blue", "seven", "eight", "nine"]
    chance = random.Random(0)
    lines = [" ".join(chance.choices(words, k=30)) for _ in range(400)]
    (place / "text" / "one.txt").write_text("\n".join(lines[:300]))
    (place / "text" / "two.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[300:]))

    def rows(name: str, make: Callable[[str, str], object]) -> None:
        pairs = [(words[i % 6], words[(i + 1) % 6]) for i in range(60)]
        (place / name).write_text("".join(json.dumps(make(*pair)) + "\n" for pair in pairs))

    def asked(word: str) -> dict[str, str]:
        return {"role": "user", "content": f"after {word}?"}

    rows("chats.jsonl", lambda a, b: {"messages": [asked(a), {"role": "assistant", "content": b}]})
    rows("pairs.jsonl", lambda a, b: {"prompt": f"after {a}?", "chosen": b, "rejected": a + a})
    rows("prompts.jsonl", lambda a, b: {"messages": [asked(a)], "wanted": b})
    (place / "reward.py").write_text(
        "def length(prompts, completions, wanted, **columns):\n"
        "    assert len(wanted) == len(completions)\n"
        "    return [1.0 / (1 + len(text)) for text in completions]\n"
    )
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "heldout.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:4]))
    (place / "task.yaml").write_text(
        "task: heldout\ndataset_path: json\ndataset_kwargs: {data_files: {test: heldout.jsonl}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    return place


def manifest(directory: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((directory / "manifest.json").read_text())


def rows_of(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def work(inputs: Path, baton: Baton, start: Callable[..., subprocess.Popen[bytes]]) -> Path:
    """Every directory of the road. Pretraining is killed on the way."""
    work = inputs.parent / "work"
    config, tokenizer = inputs / "config.json", work / "tokenizer"
    baton("pretrain", "tokenizer", "--source", inputs / "text", "--target", tokenizer, "--vocab-size", 512)
    baton("convert", "init", "--model-config", config, "--tokenizer", tokenizer, "--target", work / "init")
    baton("convert", "to-megatron", "--source", work / "init", "--target", work / "init-mg")
    baton("convert", "verify", "--source", work / "init", "--target", work / "init-mg")
    baton(
        *("pretrain", "prepare", "--source", inputs / "text", "--tokenizer", tokenizer, "--target", work / "corpus"),
        *("--validation-fraction", 0.1),
    )
    pretrain = (
        *("pretrain", "train", "--source", work / "init-mg", "--data", work / "corpus"),
        *("--sequence-length", 32, "--steps", STEPS, "--save-every", 3, *TRAIN, "--target"),
    )
    baton(*pretrain, work / "undisturbed-mg")
    process = start(*pretrain, work / "base-mg")
    while not (work / "base-mg" / "iter_0000003").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    baton(*pretrain, work / "base-mg")
    baton("convert", "to-hf", "--source", work / "base-mg", "--target", work / "base")
    measured = ("--text", inputs / "heldout.jsonl", "--precision", "fp32", "--window", 24, "--stride", 9, "--target")
    baton("convert", "to-megatron", "--source", work / "base", "--target", work / "base-in-bf16-mg")
    baton("pretrain", "evaluate-text", "--source", work / "base-in-bf16-mg", *measured, work / "text-mg")
    baton("infer", "evaluate-text", "--source", work / "base", "--engine", "hf", *measured, work / "text")
    baton(
        *("sft", "prepare", "--source", inputs / "chats.jsonl", "--tokenizer", tokenizer, "--target", work / "chats"),
        *("--sequence-length", 64),
    )
    baton(
        *("sft", "train", "--source", work / "base-mg", "--data", work / "chats", "--target", work / "sft-mg"),
        *("--steps", 4, *TRAIN),
    )
    baton("convert", "to-hf", "--source", work / "sft-mg", "--target", work / "sft")
    few = ("--global-batch-size", 8, "--micro-batch-size", 8)
    baton(
        *("rlhf", "reward", "--source", work / "sft", "--data", inputs / "pairs.jsonl", "--target", work / "reward"),
        *few,
    )
    reward = f"0.5*model:{work / 'reward'},py:{inputs / 'reward.py'}:length"
    few += ("--steps", 2, "--max-new-tokens", 8)
    baton(
        *("rlhf", "ppo", "--source", work / "sft", "--prompts", inputs / "prompts.jsonl", "--reward", reward),
        *("--target", work / "ppo", "--rollout-batch-size", 16, *few),
    )
    baton(
        *("rlhf", "grpo", "--source", work / "sft", "--prompts", inputs / "prompts.jsonl", "--reward", reward),
        *("--target", work / "grpo", *few),
    )
    baton(
        *("infer", "generate", "--source", work / "ppo", "--prompts", inputs / "prompts.jsonl"),
        *("--target", work / "replies", "--max-tokens", 8),
    )
    baton("infer", "evaluate", "--source", work / "ppo", "--tasks", inputs / "task.yaml", "--target", work / "scores")
    return work


def test_a_killed_run_continues_the_same_curve(work: Path) -> None:
    whole, resumed = (rows_of(work / name / "metrics.jsonl") for name in ("undisturbed-mg", "base-mg"))
    curves = [[(row["step"], row["loss"]) for row in rows if "loss" in row] for rows in (whole, resumed)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, STEPS + 1))
    assert curves[0][-1][1] < curves[0][0][1]


def test_every_directory_says_where_it_came_from(work: Path) -> None:
    """Each manifest names its inputs by their content: the road can be walked backwards."""
    known = {
        f"sha256:{hashlib.sha256((path / 'manifest.json').read_bytes()).hexdigest()}": path.name
        for path in work.iterdir()
        if (path / "manifest.json").is_file()
    }

    def parents(name: str) -> set[tuple[str, str]]:
        return {(p["flag"], known.get(p["fingerprint"], p["name"])) for p in manifest(work / name)["parents"]}

    assert parents("scores") == {("source", "ppo"), ("tasks", "task.yaml"), ("tasks", "heldout.jsonl")}
    assert parents("ppo") >= {("source", "sft"), ("prompts", "prompts.jsonl")}
    assert {name for flag, name in parents("ppo") if flag.startswith("reward")} == {"reward", "reward.py"}
    assert parents("sft") == {("source", "sft-mg")}
    assert parents("sft-mg") == {("source", "base-mg"), ("data", "chats")}
    assert parents("base-mg") == {("source", "init-mg"), ("data", "corpus")}
    assert ("tokenizer", "tokenizer") in parents("corpus")
    assert parents("init-mg") == {("source", "init")}


def test_the_model_card_has_every_training(work: Path) -> None:
    card = (work / "ppo" / "README.md").read_text()
    stages = [line for line in card.splitlines() if line.startswith("1. ")]
    assert [line.partition(": ")[2].partition(";")[0] for line in stages] == [
        "`--source init-mg`, `--data corpus`",
        "`--source base-mg`, `--data chats`",
        "`--source sft`, `--prompts prompts.jsonl`, `--reward-source reward`, `--reward-source reward.py`",
    ]
    assert f"step {STEPS}, " in stages[0]
    assert ", bits_per_byte " in stages[0]
    assert ", loss " in stages[1]
    assert "base_model: sft\n" in card
    assert "datasets:\n- corpus\n- chats\n- prompts.jsonl\n" in card
    assert not (work / "init" / "README.md").exists()


def test_the_tokenizer_arrives_unchanged(work: Path) -> None:
    made = (work / "tokenizer" / "tokenizer.json").read_bytes()
    for name in ("init", "base", "sft", "reward", "ppo", "grpo"):
        assert (work / name / "tokenizer.json").read_bytes() == made, name


def test_every_prompt_has_its_reply(work: Path, inputs: Path) -> None:
    replies, prompts = rows_of(work / "replies" / "generations.jsonl"), rows_of(inputs / "prompts.jsonl")
    assert [{key: row[key] for key in ("messages", "wanted")} for row in replies] == prompts
    assert all(isinstance(row["completion"], str) for row in replies)


def test_the_score_is_a_number_of_bits(work: Path) -> None:
    results = json.loads((work / "scores" / "results.json").read_text())
    assert 0 < results["results"]["heldout"]["bits_per_byte,none"] < 8


def test_an_export_has_the_same_bits_per_byte_in_megatron_core(work: Path) -> None:
    """The run itself has weights in fp32, which the export rounds to bf16."""
    one, other = (json.loads((work / name / "results.json").read_text())["results"] for name in ("text-mg", "text"))
    # fp32 in Megatron-Core and in transformers: other orders of addition
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        assert one["heldout.jsonl"][metric] == pytest.approx(other["heldout.jsonl"][metric], rel=1e-6)
    rows = [rows_of(work / name / "samples_heldout.jsonl.jsonl") for name in ("text-mg", "text")]
    assert [row["doc_hash"] for row in rows[0]] == [row["doc_hash"] for row in rows[1]]


def test_nothing_is_left_beside_the_directories(work: Path) -> None:
    assert not [path.name for path in work.iterdir() if ".partial-" in path.name or path.name.endswith(".state")]
