"""Packed rows against an independent implementation."""

import base64
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import invoked
from shared.errors import AlreadyDone, UserError
from tools.sft import prepare
from tools.sft.options import ReadingOptions

WORDS = ["hello", "def", "name", "what is it?", "\u00e9", "\U0001f600", "\n\n", "  ", "return x"]


def _talk(chance: random.Random) -> list[dict[str, str]]:
    talk = []
    for _ in range(chance.randint(1, 3)):
        for role in ("user", "assistant"):
            talk.append({"role": role, "content": " ".join(chance.choices(WORDS, k=chance.randint(1, 6))) + "."})
    return talk


@pytest.fixture
def talks(tmp_path: Path) -> list[list[dict[str, str]]]:
    chance = random.Random(0)
    talks = [_talk(chance) for _ in range(80)]
    rows = [json.dumps({"messages": talk}) + "\n" for talk in talks]
    (tmp_path / "talks.jsonl").write_text("".join(rows))
    return talks


def _prepare(folder: Path, tokenizer: Path, target: str = "out", **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sequence_length": 256,
        "validation": None,
        "validation_fraction": 0.0,
        "reading": ReadingOptions(),
        "overlong": "error",
        "workers": 1,
        "overwrite": False,
        **options,
    }
    source = (folder / "talks.jsonl",)
    recorded = {"source": source, "tokenizer": tokenizer, **given} | vars(given["reading"])
    del recorded["reading"]
    with invoked("sft", "prepare", recorded, not_fingerprinted=("workers",)):
        prepare.run(source=source, tokenizer=tokenizer, target=folder / target, **given)
    return open_checkpoint(folder / target, kinds=("dataset",), flag="--data").facts


def _arrays(target: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, labels, segments = (np.load(target / f"{split}.{name}.npy") for name in ("tokens", "labels", "segments"))
    assert tokens.dtype == labels.dtype == segments.dtype == np.int32
    assert tokens.shape == labels.shape == segments.shape
    return tokens, labels, segments


def _conversations(target: Path, split: str = "train") -> list[tuple[str, str]]:
    """(whole text, text of the labels) of every segment, by looking at the arrays alone."""
    tokenizer = AutoTokenizer.from_pretrained(target / "tokenizer")
    tokens, labels, segments = _arrays(target, split)
    found = []
    for row in range(len(tokens)):
        used = int((segments[row] > 0).sum())
        assert (segments[row, :used] > 0).all(), "padding comes last"
        assert (np.diff(segments[row, :used]) >= 0).all(), "a conversation is one stretch"
        assert (labels[row, used:] == -100).all()
        for number in range(1, int(segments[row].max()) + 1):
            places = np.flatnonzero(segments[row] == number)
            ids, targets = tokens[row, places], labels[row, places]
            assert targets[-1] == -100, "the last token has no successor in its conversation"
            assert ((targets[:-1] == ids[1:]) | (targets[:-1] == -100)).all(), "a label is the next token"
            found.append((tokenizer.decode(ids), tokenizer.decode(targets[targets != -100])))
    return found


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_labels_are_what_the_assistants_said(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path, template: str
) -> None:
    facts = _prepare(tmp_path, tokenizers(template))
    expected = Counter(
        (
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk),
            "".join(f"{m['content']}<|im_end|>" for m in talk if m["role"] == "assistant"),
        )
        for talk in talks
    )
    assert Counter(_conversations(tmp_path / "out")) == expected
    tokens, labels, segments = _arrays(tmp_path / "out")
    split = facts["splits"]["train"]
    assert split["sequences"] == len(tokens)
    assert split["tokens"] == int((segments > 0).sum())
    assert split["target_tokens"] == int((labels != -100).sum())
    assert split["conversations"] == len(talks)
    assert (tokens[segments == 0] == facts["pad_token_id"]).all()
    assert split["tokens"] / tokens.size > 0.9, "rows are well filled"


def test_the_number_of_workers_changes_nothing(
    tokenizers: Callable[..., Path], talks: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    tokenizer = tokenizers("marked")
    one = _prepare(tmp_path, tokenizer, "one", workers=1)
    two = _prepare(tmp_path, tokenizer, "two", workers=2)
    assert one == two
    for a, b in zip(_arrays(tmp_path / "one"), _arrays(tmp_path / "two"), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_overlong_conversations_are_accounted_for(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path, overlong: str
) -> None:
    whole = Counter(_conversations_of(_prepare(tmp_path, tokenizers("marked"), "whole"), tmp_path / "whole"))
    facts = _prepare(tmp_path, tokenizers("marked"), sequence_length=60, overlong=overlong)
    report = facts["conversations"]
    found = _conversations(tmp_path / "out")
    assert report["read"] == len(talks)
    assert report["packed"] == len(found) == facts["splits"]["train"]["conversations"]
    assert report["packed"] + report["dropped_overlong"] + report["dropped_without_target"] == len(talks)
    uncut = sum((Counter(found) & whole).values())
    if overlong == "drop":
        assert report["dropped_overlong"] > 0 == report["truncated"]
        assert uncut == len(found)
    else:
        assert report["truncated"] > 0 == report["dropped_overlong"]
        assert uncut == len(found) - report["truncated"]
        beginnings = [text for text, _ in whole]
        assert all(any(text.startswith(cut.rstrip("\ufffd")) for text in beginnings) for cut, _ in found)
        assert all(said for _, said in found)


def _conversations_of(facts: dict[str, Any], target: Path) -> list[tuple[str, str]]:
    assert facts["format"] == "packed"
    return _conversations(target)


def test_a_question_that_fills_the_row_leaves_nothing_to_learn(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"instruction": "hello " * 50, "output": "a"}, {"instruction": "hello", "output": "name " * 50}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = _prepare(tmp_path, tokenizers("marked"), sequence_length=40, overlong="truncate")
    assert facts["conversations"] == {
        "read": 2,
        "packed": 1,
        "truncated": 1,
        "dropped_overlong": 0,
        "dropped_without_target": 1,
    }


def test_too_long_is_an_error_that_names_the_line(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"talks\.jsonl:\d+: \d+ tokens, more than --sequence-length 30"):
        _prepare(tmp_path, tokenizers("marked"), sequence_length=30)
    assert {path.name for path in tmp_path.iterdir()} == {"talks.jsonl"}


def test_a_share_for_validation(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    with (tmp_path / "talks.jsonl").open("a") as file:  # twice the same: both must land on one side
        file.write("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    facts = _prepare(tmp_path, tokenizers("marked"), validation_fraction=0.25)
    train, validation = (_conversations(tmp_path / "out", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 2 * len(talks)
    assert not {text for text, _ in train} & {text for text, _ in validation}
    assert facts["validation_conversations_in_train"] == 0
    assert 0.1 < len(validation) / 160 < 0.45


def test_conversations_in_both_splits_are_counted(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    fresh = {"instruction": "hello", "output": "name"}
    other.write_text(json.dumps({"messages": talks[4]}) + "\n" + json.dumps(fresh) + "\n")
    facts = _prepare(tmp_path, tokenizers("marked"), validation=(other,))
    assert facts["validation_conversations_in_train"] == 1
    assert facts["splits"]["validation"]["conversations"] == 2


def test_mistakes_name_their_line(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    good = json.dumps({"instruction": "hello", "output": "name"}) + "\n"
    for bad, problem in (("[]", "a JSON object is expected"), ('{"x": 1}', "none of messages")):
        (tmp_path / "talks.jsonl").write_text(good + bad + "\n" + good)
        with pytest.raises(UserError, match=rf"talks\.jsonl:2: {problem}"):
            _prepare(tmp_path, tokenizers("marked"))
    (tmp_path / "talks.jsonl").write_text(good + json.dumps({"instruction": "", "output": "\U0001f600"}))
    with pytest.raises(UserError, match=r"talks\.jsonl:1: message 1: the model's prompt before it"):
        _prepare(tmp_path, tokenizers("backwards"))


def test_a_tokenizer_without_a_template_is_refused(
    tokenizers: Callable[..., Path], talks: object, tmp_path: Path
) -> None:
    tokenizer = tokenizers("marked")
    (tokenizer / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        _prepare(tmp_path, tokenizer)


def test_the_length_is_the_models_unless_given(tokenizers: Callable[..., Path], talks: object, tmp_path: Path) -> None:
    tokenizer = tokenizers("marked")
    assert _prepare(tmp_path, tokenizer, "none", sequence_length=None)["seq_length"] == 2048
    (tokenizer / "config.json").write_text(json.dumps({"max_position_embeddings": 300}))
    (tokenizer / "model.safetensors").write_text("")
    assert _prepare(tmp_path, tokenizer, "given", sequence_length=None)["seq_length"] == 300
    inside = {"model_type": "gemma3", "text_config": {"max_position_embeddings": 200}}
    (tokenizer / "config.json").write_text(json.dumps(inside))  # of the language model, where there is more
    assert _prepare(tmp_path, tokenizer, "inside", sequence_length=None)["seq_length"] == 200


def test_a_finished_dataset_is_not_made_again(tokenizers: Callable[..., Path], talks: object, tmp_path: Path) -> None:
    tokenizer = tokenizers("marked")
    _prepare(tmp_path, tokenizer)
    with pytest.raises(AlreadyDone):
        _prepare(tmp_path, tokenizer, workers=2)
    with pytest.raises(UserError, match="--overwrite"):
        _prepare(tmp_path, tokenizer, sequence_length=128)


def _source(folder: Path, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "talks.jsonl").write_text("".join(line + "\n" for line in lines))


PAIR = {"prompt": "hello", "completion": "name"}


def test_bad_rows_are_set_aside_with_their_reasons(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    _source(tmp_path, [PAIR, "{", {"x": 1}, "[]", {"prompt": "a", "completion": "\ud800"}, PAIR])
    facts = _prepare(tmp_path, tokenizers("marked"), reading=ReadingOptions(on_error="set-aside"))
    assert facts["conversations"]["packed"] == 2
    assert facts["conversations"]["set_aside"] == 4
    aside = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["row"]) for entry in aside[:2]] == [(2, "{"), (3, {"x": 1})]
    assert [entry["line"] for entry in aside] == [2, 3, 4, 5]
    for entry, why in zip(aside, ("not JSON", "none of messages", "a JSON object", "lone surrogate"), strict=True):
        assert why in entry["reason"]
        assert "talks.jsonl" not in entry["reason"]
    _source(tmp_path, [PAIR])
    facts = _prepare(tmp_path, tokenizers("marked"), "none", reading=ReadingOptions(on_error="set-aside"))
    assert facts["conversations"]["set_aside"] == 0
    assert not (tmp_path / "none/rejects.jsonl").exists()


def test_a_limit_takes_the_first_conversations(
    tokenizers: Callable[..., Path],
    talks: list[list[dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    tokenizer = tokenizers("marked")
    facts = _prepare(tmp_path, tokenizer, reading=ReadingOptions(limit=7))
    assert facts["splits"]["train"]["conversations"] == 7
    _source(tmp_path, [{"messages": talk} for talk in talks[:7]])
    _prepare(tmp_path, tokenizer, "seven")
    for one, other in zip(_arrays(tmp_path / "out"), _arrays(tmp_path / "seven"), strict=True):
        assert np.array_equal(one, other)


def test_what_was_rendered_with_is_published(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    _source(tmp_path, [PAIR])
    tokenizer = tokenizers("marked")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "old"}))
    (tokenizer / "additional_chat_templates").mkdir()
    (tokenizer / "additional_chat_templates/tool_use.jinja").write_text("old")
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ opening }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    reading = ReadingOptions(chat_template=template, template_argument=("opening=hello",))
    facts = _prepare(tmp_path, tokenizer, reading=reading)
    assert _conversations(tmp_path / "out") == [
        ("hello<|im_start|>hello<|im_end|><|im_start|>name<|im_end|>", "name<|im_end|>")
    ]
    published = tmp_path / "out/tokenizer"
    fresh = AutoTokenizer.from_pretrained(published)
    talk = [{"role": "user", "content": "a"}]
    assert fresh.chat_template.endswith(template.read_text())
    assert fresh.apply_chat_template(talk, tokenize=False) == "hello<|im_start|>a<|im_end|>"
    assert fresh.apply_chat_template(talk, tokenize=False, opening="") == "<|im_start|>a<|im_end|>"
    assert "chat_template" not in json.loads((published / "tokenizer_config.json").read_text())
    assert not list(published.glob("additional_chat_templates/*"))
    assert facts["template_arguments"] == {"opening": "hello"}
    assert facts["turn_end_token_ids"] == [fresh.eos_token_id]
    _prepare(tmp_path, tokenizer, "file", reading=ReadingOptions(chat_template=template, spans="rendered"))
    assert (tmp_path / "file/tokenizer/chat_template.jinja").read_text() == template.read_text()
    _prepare(tmp_path, tokenizer, "named")
    assert (tmp_path / "named/tokenizer/additional_chat_templates/tool_use.jinja").read_text() == "old"


def test_parts_of_a_row_that_the_template_leaves_out_are_counted(
    tokenizers: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _source(tmp_path, [PAIR | {"tools": [{"name": "f"}]}, PAIR])
    facts = _prepare(tmp_path, tokenizers("marked"))
    note = "the chat template does not render 'tools', so the model does not see them"
    assert facts["notes"] == {note: 1}
    assert f"1 conversation: {note}" in capfd.readouterr().err


def test_a_tokenizer_without_tokenizer_json_prepares_too(
    tokenizers: Callable[..., Path], talks: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    """Qwen 1's: a table of tiktoken, here of single bytes, and tokens that its class adds. A template comes from elsewhere."""
    own = tmp_path / "qwen"
    own.mkdir()
    ranks = [base64.b64encode(bytes([number])) + b" %d\n" % number for number in range(256)]
    (own / "qwen.tiktoken").write_bytes(b"".join(ranks))
    (own / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    (own / "config.json").write_text(json.dumps({"model_type": "qwen", "max_position_embeddings": 1024}))
    (own / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    template = tokenizers("chatml") / "chat_template.jinja"
    facts = _prepare(tmp_path, own, reading=ReadingOptions(chat_template=template), sequence_length=1024)
    assert facts["vocab_size"] == 256 + 208
    assert facts["turn_end_token_ids"] == [258]
    out = tmp_path / "out"
    assert (out / "tokenizer" / "qwen.tiktoken").read_bytes() == (own / "qwen.tiktoken").read_bytes()
    _, labels, _ = _arrays(out)
    ids = [number for number in labels[labels != -100].tolist() if number != 258]
    said = "".join(message["content"] for talk in talks for message in talk if message["role"] == "assistant")
    assert Counter(bytes(ids)) == Counter(unicodedata.normalize("NFC", said).encode())
