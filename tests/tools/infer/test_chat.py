"""`infer chat`: the conversation it keeps, and one real exchange."""

from __future__ import annotations

import io

import pytest

from tests.tools.infer.engines.double import EngineDouble
from tools.infer import chat
from tools.infer.chat import converse
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.sampling import Sampling


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


def test_reset_starts_anew_and_exit_leaves(capsys):
    asked = conversation(["one", "/reset", "two", "/exit", "three"])
    assert asked == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]


@pytest.mark.parametrize("family", ["llama"])
def test_a_pipe_is_answered_line_by_line(family, launcher, models, greedy):
    source = models(family)
    done = launcher("chat", "--source", source, "--max-tokens", 8, stdin="fox?\n/reset\ndog?\n")
    assert done.code == 0, done.stderr
    wanted = [greedy(source, [{"role": "user", "content": text}], 8) for text in ("fox?", "dog?")]
    assert done.stdout == "".join(text + "\n" for text in wanted)


def test_a_tokenizer_without_a_template_is_named(launcher, models):
    done = launcher("chat", "--source", models("qwen3"), stdin="fox?\n")
    assert done.code == 2
    assert "has no chat template" in done.stderr


def test_a_conversation_goes_to_any_engine(models, monkeypatch, capsys):
    double = EngineDouble()
    monkeypatch.setattr(chat, "open_engine", double.open)
    monkeypatch.setattr("sys.stdin", io.StringIO("fox?\ndog?\n"))
    sampling = Sampling(max_tokens=4, temperature=0.5, top_p=1.0, seed=1)
    chat.run(models("llama"), system="be brief", sampling=sampling, settings=EngineSettings(batch_size=1, seed=1))
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"
    assert double.calls == ["load", "close"]
    assert [request.sampling for request in double.requests] == [sampling, sampling]
    first, second = (request.prompt for request in double.requests)
    assert len(second) > len(first)  # it holds the first turn
