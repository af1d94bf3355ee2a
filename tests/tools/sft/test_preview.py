"""What a preview shows is what is trained on, in the terminal and as a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import UserError
from tools.sft.options import ReadingOptions
from tools.sft.preview import run

ROWS = [
    {"prompt": "what is <b>?", "completion": "it is\n\U0001f600 & more"},
    {"prompt": "hello"},
    {"prompt": "hello", "completion": "name", "tools": [{"name": "f"}]},
    {"prompt": "one", "completion": "too many"},
]
ASIDE = ReadingOptions(on_error="set-aside")


def _source(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_trained_tokens_stand_out(
    tokenizers: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(tmp_path)
    run(source=(source,), tokenizer=tokenizers("chatml"), reading=ASIDE, html=None)
    printed = capsys.readouterr().out
    assert all(int(loss) < int(every) for every, loss in re.findall(r": (\d+) tokens, (\d+) with", printed))
    assert re.sub(r"\d+ tokens, \d+ with", "... with", printed).splitlines() == [
        f"{source}:1: ... with a loss",
        "<|im_start|>user",
        "what is <b>?<|im_end|>",
        "<|im_start|>assistant",
        "\u27e6it is",
        "\U0001f600 & more<|im_end|>\u27e7",
        "",
        "",
        f"{source}:2",
        "set aside: no key 'completion' beside the other of prompt and completion",
        f"{source}:3: ... with a loss; the chat template does not render 'tools', so the model does not see them",
        "<|im_start|>user",
        "hello<|im_end|>",
        "<|im_start|>assistant",
        "\u27e6name<|im_end|>\u27e7",
        "",
        "",
    ]


def test_a_terminal_gets_colours(
    tokenizers: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run(source=(_source(tmp_path),), tokenizer=tokenizers("chatml"), reading=ReadingOptions(limit=1), html=None)
    shown = capsys.readouterr().out
    assert "\x1b[30;42mit is" in shown
    assert "\u27e6" not in shown


def test_a_page(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    source = _source(tmp_path)
    run(source=(source,), tokenizer=tokenizers("chatml"), reading=ASIDE, html=page)
    written = page.read_text()
    assert "user\nwhat is &lt;b&gt;?&lt;|im_end|&gt;" in written
    assert "assistant\n<b>it is\n\U0001f600 &amp; more&lt;|im_end|&gt;</b>\n</pre>" in written
    assert "set aside: no key &#x27;completion&#x27;" in written
    assert "too many" not in written


def test_mistakes_are_one_line(tokenizers: Callable[..., Path], tmp_path: Path) -> None:
    source, tokenizer = _source(tmp_path), tokenizers("chatml")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no key 'completion'"):
        run(source=(source,), tokenizer=tokenizer, reading=ReadingOptions(), html=None)
    with pytest.raises(UserError, match=r"--html .*: .*/none is not a directory"):
        run(source=(source,), tokenizer=tokenizer, reading=ASIDE, html=tmp_path / "none/a.html")
    source.write_text("")
    with pytest.raises(UserError, match="no row in it"):
        run(source=(source,), tokenizer=tokenizer, reading=ASIDE, html=None)
