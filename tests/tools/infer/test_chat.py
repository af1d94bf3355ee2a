"""`infer chat`: the conversation it keeps, and one real exchange."""

from __future__ import annotations

import pytest

from tools.infer.chat import converse


def conversation(lines: list[str], system: str | None = None) -> list[list[dict]]:
    """What the model was asked at each turn; it answers with the number of messages."""
    asked = []

    def reply(messages):
        asked.append(messages)
        yield from ("n=", str(len(messages)))

    converse(iter(lines), reply, system)
    return asked


def test_each_turn_sees_those_before(capsys):
    asked = conversation(["one\n", "\n", "two\n"], system="be brief")
    assert capsys.readouterr().out == "n=2\nn=4\n"
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][2]["content"] == "n=2"


def test_reset_forgets_and_exit_leaves(capsys):
    asked = conversation(["one", "/reset", "two", "/exit", "three"])
    assert asked == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]


@pytest.mark.parametrize("family", ["llama"])
def test_a_pipe_is_answered_line_by_line(family, launcher, models, greedy):
    source = models(family)
    done = launcher("chat", "--source", source, "--precision", "fp32", "--max-tokens", 8, stdin="fox?\n/reset\ndog?\n")
    assert done.code == 0, done.stderr
    wanted = [greedy(source, [{"role": "user", "content": text}], 8) for text in ("fox?", "dog?")]
    assert done.stdout == "".join(text + "\n" for text in wanted)


def test_a_tokenizer_without_a_template_is_named(launcher, models):
    done = launcher("chat", "--source", models("qwen3"), stdin="fox?\n")
    assert done.code == 2
    assert "has no chat template" in done.stderr
