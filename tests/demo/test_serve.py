"""The demo's client of a server: it waits for the ready line, writes the answers whole, and ends the server."""

import json
import sys
from pathlib import Path

import serve

SERVER = """
import signal, sys
print("loading", flush=True)
print("ready http://127.0.0.1:9/v1 some name", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.pause()
"""


def test_answers_are_written_into_a_folder_that_is_not_there(tmp_path) -> None:
    target = tmp_path / "answers" / "tuned.json"
    command = [sys.executable, "-c", SERVER]
    asked = []

    def answers(url: str, name: str, prompts: Path) -> dict[str, list[str]]:
        asked.append((url, name, prompts))
        return {"replies": ["é"]}

    assert serve.main(command, tmp_path / "prompts.jsonl", target, answers) == 0
    assert asked == [("http://127.0.0.1:9/v1", "some name", tmp_path / "prompts.jsonl")]
    assert json.loads(target.read_text()) == {"replies": ["é"]}
    assert [path.name for path in target.parent.iterdir()] == ["tuned.json"]
    assert serve.main(["false"], tmp_path / "prompts.jsonl", target, answers) == 0  # already done


def test_a_server_that_ends_early_is_a_failure_and_nothing_is_written(tmp_path) -> None:
    command = [sys.executable, "-c", "import sys; print('no'); sys.exit(3)"]
    assert serve.main(command, tmp_path / "prompts.jsonl", tmp_path / "a" / "b.json", lambda *given: {}) == 3
    assert not list(tmp_path.iterdir())
