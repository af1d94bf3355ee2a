"""Prompts and preferences: token ids equal a roll-out's; errors have file and line."""

import json

import pytest

from shared.errors import UserError
from tools.rlhf.data import read_preferences, read_prompts, read_ranked_replies


@pytest.fixture(scope="module")
def tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world.policy)


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def prompts(path, tokenizer):
    return read_prompts(path, tokenizer, context_length=96, max_new_tokens=16)


def test_prompts_as_text_and_as_messages(file, tokenizer):
    text, chat = prompts(
        file({"prompt": "colors: red", "answer": 3}, {"messages": [{"role": "user", "content": "red"}]}), tokenizer
    )
    assert text.text == chat.text == "colors: red"  # the template adds the beginning
    assert text.ids == chat.ids == tuple(tokenizer("colors: red")["input_ids"])
    assert (text.columns, chat.columns) == ({"answer": 3}, {"answer": None})


def test_a_folder_of_rows_is_read_in_order(tmp_path, tokenizer):
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "b.json").write_text('[{"prompt": "blue"}]')
    (tmp_path / "a.jsonl").write_text('{"prompt": "red"}\n')
    assert [prompt.text for prompt in prompts(tmp_path, tokenizer)] == ["red", "blue"]


def test_a_preference_is_prompt_reply_and_end(file, tokenizer):
    rows = [
        {"prompt": "colors:", "chosen": " red", "rejected": " blue"},
        {
            "prompt": [{"role": "user", "content": "red"}],
            "chosen": [{"role": "assistant", "content": " red"}],
            "rejected": " pink",
        },
    ]
    (text, chat), dropped = read_preferences(file(*rows), tokenizer, max_length=96)
    ids = {word: tuple(tokenizer(word)["input_ids"]) for word in ("colors:", "colors: red", " red", " blue")}
    assert text.chosen == (*ids["colors:"], *ids[" red"], 1)
    assert text.rejected == (*ids["colors:"], *ids[" blue"], 1)
    assert chat.chosen == (*ids["colors: red"], *ids[" red"], 1)
    assert dropped == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: a JSON object"),
        ({"text": "a"}, ":2: no column 'prompt' or 'messages' (the row has: text)"),
        ({"prompt": ""}, ":2: 'prompt' is empty"),
        ({"prompt": 3}, ":2: 'prompt' is neither"),
        ({"prompt": "red", "messages": [{"role": "user", "content": "red"}]}, ":2: both 'prompt' and 'messages'"),
        ({"prompt": "red", "tools": [{"name": "f"}]}, ":2: 'tools' are rendered by the chat template"),
        (
            {"messages": [{"role": "user", "content": "red"}], "tools": [{"name": "f"}]},
            ":2: the chat template does not",
        ),
        ({"messages": [{"role": "user", "content": "red"}], "tools": "{"}, ":2: 'tools' is not JSON"),
        ({"messages": [{"role": "user"}]}, ":2: 'messages', message 0 (user): content is NoneType"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ":2: the prompt ends with an assistant"),
        ({"prompt": "red", "completions": 1}, ":2: a column may not be called 'completions'"),
        ({"prompt": " red" * 81}, "do not fit the model's context of 96"),
    ],
)
def test_bad_prompts_are_named(file, tokenizer, row, says):
    path = file({"prompt": "red"}, row)
    with pytest.raises(UserError, match="rows.jsonl:2") as error:
        prompts(path, tokenizer)
    assert says in str(error.value)


def test_tools_are_rendered_where_the_template_knows_them(file, tokenizer, monkeypatch):
    known = "{% for t in tools %}{{ t['name'] }}{% endfor %}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", known)
    messages, tools = [{"role": "user", "content": "red"}], [{"name": "blue"}]
    for given in (tools, json.dumps(tools)):
        (prompt,) = prompts(file({"messages": messages, "tools": given}), tokenizer)
        assert prompt.text == "bluecolors: red"
        row = {"prompt": messages, "chosen": " red", "rejected": " pink", "tools": given}
        ((pair,), _) = read_preferences(file(row), tokenizer, max_length=96)
        assert pair.chosen[: len(prompt.ids)] == prompt.ids


def test_an_empty_file_is_named(file, tokenizer):
    with pytest.raises(UserError, match="no row in it"):
        prompts(file(""), tokenizer)


def talk(*said):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]


def test_ranked_replies_are_split_where_the_reply_begins(tokenizer, file):
    rows = [
        {"prompt": "colors:", "chosen": " red blue", "rejected": " black"},
        {"chosen": "colors: red blue", "rejected": "colors: red black pink"},
        {"prompt": "colors:", "chosen": " red" * 90, "rejected": " blue"},
        {"chosen": talk("pink", " red", "more", " blue"), "rejected": talk("pink", " blue", "more", " red")},
    ]
    (given, whole), dropped = read_ranked_replies(file(*rows), tokenizer, max_length=64, context_length=96)
    ids = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    assert (given.prompt, given.chosen) == (ids("colors:"), (*ids(" red blue"), 1))
    assert whole.prompt == ids("colors: red")
    assert (whole.chosen, whole.rejected) == ((*ids(" blue"), 1), (*ids(" black pink"), 1))
    assert dropped == {"too long": 1, "of two prompts": 1}
