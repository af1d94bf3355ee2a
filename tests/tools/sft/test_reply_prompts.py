"""Replies to --prompts during a training: those of transformers' generate, at the end, in the report, the same after a resume."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.families import registry
from tests import training_runs
from tests.training_runs import random_model, signalled
from tests.workers import ROOT
from tools.sft.cli import tool

CONVERT = ROOT / "tools" / "convert" / ".venv" / "bin" / "python"
CHATS = [
    {"messages": [{"role": "user", "content": f"Say <{word}>"}, {"role": "assistant", "content": word * 3}]}
    for word in ("hello", "sunny", "there", "today", "well", "good", "rain", "cloud")
]
OPTIONS = {
    "global_batch_size": 2,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "steps": 6,
    "save_every": 4,
    "track": "none",
}
TOKENS = 12


@pytest.fixture(scope="module")
def given(tokenizers, tmp_path_factory) -> Path:
    """A folder with a source, a dataset and prompts."""
    folder = tmp_path_factory.mktemp("replies")
    tokenizer = tokenizers("chatml")
    model = {
        **{"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
        **{
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer)),
        },
        **{"max_position_embeddings": 96, "tie_word_embeddings": True},
    }
    random_model(folder / "source", registry.from_config(model))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    words = training_runs.words(
        "prepare",
        source=folder / "chats.jsonl",
        tokenizer=tokenizer,
        target=folder / "data",
        sequence_length=64,
        workers=1,
    )
    assert training_runs.exit_code(tool, words) == 0
    rows = [CHATS[0], {"prompt": "<|im_start|>user\nSay"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(given: Path, target: Path, **options) -> int:
    options = {"source": given / "source", "data": given / "data", "target": target, **OPTIONS, **options}
    return training_runs.exit_code(tool, training_runs.words("train", **options))


def asked(given: Path) -> dict:
    return {"prompts": given / "prompts.jsonl", "prompts_every": 3, "reply_tokens": TOKENS}


@pytest.fixture(scope="module")
def answered(given, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("answered") / "run"
    assert run(given, target, **asked(given)) == 0
    return target


def replies(target: Path) -> list[dict]:
    return [json.loads(line) for line in (target / "replies.jsonl").read_text().splitlines()]


def test_the_last_replies_are_those_of_transformers(answered, tmp_path):
    paths = ("--source", answered, "--target", tmp_path / "hf")
    subprocess.run([CONVERT, "-m", "tools.convert.cli", "to-hf", *paths], cwd=ROOT, check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = replies(answered)
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, place) for step in (0, 3, 6) for place in (0, 1)]
    question = tokenizer.apply_chat_template(CHATS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert [row["text"] for row in rows[-2:]] == [question, "<|im_start|>user\nSay"]
    for row in rows[-2:]:
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :].tolist()
        ended = made[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert row["reply"] == tokenizer.decode(made[:-1] if ended else made)
        assert (row["tokens"], row["ended"]) == (len(made), ended)
    assert {row["reply"] for row in rows[:2]} != {row["reply"] for row in rows[-2:]}


def test_they_are_in_the_report(answered):
    report = (answered / "report.html").read_text()
    assert "<pre>&lt;|im_start|&gt;user\nSay &lt;hello&gt;" in report
    assert [f"after update {step}" in report for step in (0, 3, 6)] == [True, True, True]


def test_a_stopped_run_gives_the_same_ones_and_no_number_moves(answered, given, tmp_path):
    target = tmp_path / "run"
    with signalled(signal.SIGTERM, after=4):
        assert run(given, target, **asked(given)) == 75
    with (target / "replies.jsonl").open("a") as file:  # of an update that a killed run did not save
        file.write(json.dumps(replies(target)[-1] | {"step": 5}) + "\n")
    assert run(given, target, **asked(given)) == 0
    assert replies(target) == replies(answered)
    assert training_runs.record(target) == training_runs.record(answered)
    quiet = tmp_path / "quiet"
    assert run(given, quiet) == 0
    assert training_runs.record(quiet) == training_runs.record(answered)
    assert not (quiet / "replies.jsonl").exists()


def test_layouts_say_the_same(answered, given, tmp_path):
    """Two tensor-parallel ranks with a shared sequence."""
    target = tmp_path / "run"
    options = {**OPTIONS, **asked(given), "tensor_parallel": 2, "sequence_parallel": "true", "steps": 1}
    line = training_runs.words("train", source=given / "source", data=given / "data", target=target, **options)
    command = [str(ROOT / "tools" / "sft" / ".venv" / "bin" / "sft"), *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert replies(target)[:2] == replies(answered)[:2]  # later ones follow the weights, which differ in the last bits


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"text": "Hi"}], {}, "prompts.jsonl:1: neither 'messages' nor 'prompt' is a key of this row"),
        ([{"prompt": "Hi"}] * 65, {}, "has more than 64 rows"),
        ([{"prompt": "Hi " * 100}], {}, "tokens, and the model's context 96"),
        ([{"prompt": " "}], {}, "prompts.jsonl:1: the prompt is empty"),
        ([], {}, "holds no prompt"),
        (None, {"prompts_every": 3}, "--prompts-every belongs to --prompts"),
        (None, {"reply_tokens": 3}, "--reply-tokens belongs to --prompts"),
        ([{"prompt": "Hi"}], {"context_parallel": 2}, "--prompts: replies are not made with --context-parallel"),
    ],
)
def test_what_cannot_be_answered_is_refused(given, tmp_path, capfd, rows, options, text):
    if rows is not None:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {**options, "prompts": tmp_path / "prompts.jsonl"}
    assert run(given, tmp_path / "run", **options) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert text in said[-1]
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path)
