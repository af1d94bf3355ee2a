"""Starting a server, asking it, stopping it."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import serve

SERVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("loading")
print("ready http://127.0.0.1:1/v1 small", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_replies_are_written_once_also_into_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(url: str, name: str, prompts: Path) -> dict[str, str]:
        return {"url": url, "name": name, "prompts": prompts.name}

    target = tmp_path / "answers/small.json"
    assert serve.main([sys.executable, "-c", SERVER], Path("prompts.jsonl"), target, answers) == 0
    assert json.loads(target.read_text()) == {
        "url": "http://127.0.0.1:1/v1",
        "name": "small",
        "prompts": "prompts.jsonl",
    }
    assert [path.name for path in target.parent.iterdir()] == ["small.json"]
    assert serve.main(["false"], Path("prompts.jsonl"), target, answers) == 0
    assert "already done" in capsys.readouterr().err


def test_a_server_that_ends_early_gives_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert serve.main(command, Path("prompts.jsonl"), tmp_path / "small.json", lambda *_: {}) == 3
    assert not (tmp_path / "small.json").exists()
