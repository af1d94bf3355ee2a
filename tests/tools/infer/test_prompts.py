"""Reading prompts: valid rows, and the error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from tools.infer.prompts import check_length, encode, load_tokenizer, read_prompts


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_rows_keep_their_fields_and_line_numbers(tmp_path):
    rows = read_prompts(
        file(tmp_path, '{"prompt": "a", "id": 1}\n\n{"messages": [{"role": "user", "content": "b"}]}\n'), ()
    )
    assert [row.row.line for row in rows] == [1, 3]
    assert rows[0].fields == {"prompt": "a", "id": 1}
    assert rows[0].prompt == "a"
    assert rows[1].prompt == [{"role": "user", "content": "b"}]


def test_a_folder_of_rows_is_read_in_order(tmp_path):
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "b.json").write_text('[{"prompt": "b"}]')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    assert [row.prompt for row in read_prompts(tmp_path, ())] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "a JSON object is expected"),
        ('{"prompt": "a", "note": "\\ud83d"}', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "'tools' is not a list"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "'tools' is not JSON"),
        ('{"text": "a"}', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": 3}', "not int"),
        ('{"messages": "a"}', "not str"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
        ('{"prompt": "a", "completion": "b"}', '"completion"'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = file(tmp_path, f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match="p.jsonl:2: ") as caught:
        read_prompts(path, ("completion",))
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("\n \n", "no prompt"), ("\udcff", "not UTF-8")])
def test_an_empty_or_binary_file_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_prompts(file(tmp_path, text), ())


def test_messages_go_through_the_template_and_raw_text_does_not(models):
    tokenizer = load_tokenizer(models("llama"))
    ids = encode(tokenizer, [{"role": "user", "content": "fox"}], "here")
    assert tokenizer.decode(ids) == "<user>fox\n<assistant>"
    assert tokenizer.decode(encode(tokenizer, "fox", "here")) == "fox"


def test_remote_code_of_a_tokenizer_is_not_run_and_the_named_fix_works(models, tmp_path, monkeypatch):
    """As LLaMAs without a class in transformers were published: tokenizer.model, and remote code that reads it."""
    config = {"tokenizer_class": "OurTokenizer", "auto_map": {"AutoTokenizer": ["ours.OurTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_bytes((models("llama") / "config.json").read_bytes())
    (tmp_path / "ours.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # at a terminal
    with pytest.raises(UserError, match=r"code in the directory, which is not run; .* as tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((models("llama") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    same = load_tokenizer(models("llama"))
    assert encode(load_tokenizer(tmp_path), "lazy fox", "here") == encode(same, "lazy fox", "here")


def test_what_cannot_be_encoded_is_refused(models):
    with pytest.raises(UserError, match="here: messages need a chat template"):
        encode(load_tokenizer(models("qwen3")), [{"role": "user", "content": "fox"}], "here")
    with pytest.raises(UserError, match="here: the prompt is empty"):
        encode(load_tokenizer(models("llama")), "", "here")


def test_a_prompt_must_leave_room_for_one_token():
    check_length([1] * 7, 8, "here")
    with pytest.raises(UserError, match="here: the prompt has 8 tokens and the context 8"):
        check_length([1] * 8, 8, "here")


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
KNOWS_TOOLS = (
    "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_tools_are_rendered_where_the_template_knows_them_and_refused_where_not(models, tmp_path):
    messages, tokenizer = [{"role": "user", "content": "fox"}], load_tokenizer(models("llama"))
    with pytest.raises(UserError, match="here: the chat template does not render 'tools'"):
        encode(tokenizer, messages, "here", TOOLS)
    with pytest.raises(UserError, match='here: "tools" are rendered by the chat template'):
        encode(tokenizer, "fox", "here", TOOLS)
    tokenizer.chat_template = KNOWS_TOOLS
    assert tokenizer.decode(encode(tokenizer, messages, "here", TOOLS)) == "[weather]fox"
    for given in (TOOLS, json.dumps(TOOLS)):
        (row,) = read_prompts(file(tmp_path, json.dumps({"messages": messages, "tools": given})), ())
        assert row.tools == TOOLS
