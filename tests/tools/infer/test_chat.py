"""`infer chat`: the conversation it keeps, and real exchanges through a pipe and a terminal."""

from __future__ import annotations

import io
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from tests.tools.infer.engines.double import EngineDouble
from tests.tools.infer.terminal import Terminal
from tools.infer import chat
from tools.infer.chat import converse
from tools.infer.cli import tool
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.sampling import Sampling
from tools.infer.thinking import parts


def conversation(lines: list[str], system: str | None = None) -> list[list[dict]]:
    """What the model was asked at each turn; it answers with the number of messages."""
    asked = []

    def reply(messages):
        asked.append(messages)
        return parts(["n=", str(len(messages))], thinking=False)

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


@pytest.mark.parametrize(("flags", "engine"), [((), "vLLM"), (("--engine", "hf"), "transformers")])
def test_a_pipe_is_answered_line_by_line(flags, engine, launcher, models, greedy):
    source = models("llama")
    done = launcher("chat", "--source", source, "--max-tokens", 8, *flags, stdin="fox?\n/reset\ndog?\n")
    assert done.code == 0, done.stderr
    assert f"loading {source} with {engine} on" in done.stderr
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


@pytest.mark.parametrize("shown", ["shown", "hidden"])
def test_thinking_is_shown_or_hidden_and_never_content(shown, capsys):
    asked = []

    def reply(messages):
        asked.append(messages)
        return parts(["<thi", "nk>sum", " it</think>\n\n", "4"], thinking=False)

    converse(iter(["2+2", "and 3+3"]), reply, None, shown)
    whole = "<think>sum it</think>\n\n4\n" if shown == "shown" else "4\n"
    assert capsys.readouterr().out == whole * 2
    assert asked[1][1] == {"role": "assistant", "content": "4", "reasoning_content": "sum it"}


@pytest.mark.parametrize(("shown", "before"), [("shown", "\x1b[2msum\x1b[0m\x1b[2m it\x1b[0m\n\n"), ("hidden", "")])
def test_thinking_is_dim_on_a_screen_and_its_tags_are_absent(shown, before, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pieces = ["<thi", "nk>sum", " it</think>\n\n", "4"]
    converse(iter(["2+2"]), lambda _: parts(pieces, thinking=False), None, shown)
    assert capsys.readouterr().out == f"{before}4\n"


def test_template_arguments_of_the_command_are_in_the_prompt(models, monkeypatch, tmp_path):
    source = shutil.copytree(models("llama"), tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}{% if shout %}!{% endif %}{{ shout }}")
    double = EngineDouble()
    monkeypatch.setattr(chat, "open_engine", double.open)
    for words, wanted in ((["--template-argument", "shout=1"], "fox!1"), ([], "fox")):
        monkeypatch.setattr("sys.stdin", io.StringIO("fox\n"))
        with pytest.raises(SystemExit) as ended:
            tool.run(["chat", "--source", str(source), *words])
        assert not ended.value.code
        assert AutoTokenizer.from_pretrained(source).decode(double.requests[-1].prompt) == wanted


def test_an_interrupt_ends_the_reply_and_not_the_conversation(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    asked, closed = [], []

    def pieces():
        try:
            yield "a"
            os.kill(os.getpid(), signal.SIGINT)
            yield "b"
            yield "c"
        finally:
            closed.append(True)

    def reply(messages):
        asked.append(messages)
        return parts(pieces(), thinking=False)

    handler = signal.getsignal(signal.SIGINT)
    converse(iter(["one", "two"]), reply, None)
    assert capsys.readouterr().out == "ab\nab\n"
    assert asked[1][1]["content"] == "ab"
    assert closed == [True, True]
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.fixture(scope="module")
def terminal(launcher, models):
    """`infer chat` of the tiny LLaMA on a terminal, after its first prompt."""
    terminal = Terminal()
    words = ["chat", "--source", models("llama"), "--system", "be brief", "--max-tokens", 8]
    request = {
        "run": [str(word) for word in words],
        "stdin": terminal.path,
        "stdout": terminal.path,
        "stderr": terminal.path,
    }
    terminal.pid = launcher.ask(request)["pid"]
    terminal.expect("/help lists commands and keys", seconds=240)
    terminal.expect(">")
    yield terminal
    terminal.close()


def test_a_conversation_is_typed_on_a_terminal(terminal, launcher, models, greedy):
    source = models("llama")
    system = {"role": "system", "content": "be brief"}
    terminal.type("fox?\x1b\rand the dog\x7f\x7f\x7fcat?\r")  # Alt-Enter; three letters taken back
    first = [system, {"role": "user", "content": "fox?\nand the cat?"}]
    wanted = greedy(source, first, 8)
    terminal.expect(wanted.strip())
    terminal.type("/reset\r")
    terminal.expect("new conversation")
    terminal.type("\x1b[A\x1b[A\r")  # two up: the message before /reset
    terminal.expect(wanted.strip())
    terminal.type("/help\r")
    terminal.expect("Alt-Enter")
    terminal.type("quick \\\rbrown\r")  # a backslash before Enter
    second = [*first, {"role": "assistant", "content": wanted}, {"role": "user", "content": "quick \nbrown"}]
    terminal.expect(greedy(source, second, 8).strip())
    terminal.expect(">")
    terminal.type("\x04")
    assert launcher.ask({"wait": terminal.pid})["code"] == 0
