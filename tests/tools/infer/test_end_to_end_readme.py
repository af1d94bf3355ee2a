"""Commands of tools/infer/README.md as they stand there, on tiny models.

`evaluate-text`, `compare`, `chat`, `rollouts` and adapters have tests of their own.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tools.infer.http_server import Server, call
from tests.tools.infer.tiny_models import TEXT, tiny_model

README = (Path(__file__).resolve().parents[3] / "tools/infer/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^infer .*$", "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)), re.MULTILINE
)
PLACE = re.compile(r"(?<![\w/-])(checkpoints|results|evaluation|prompts\.jsonl)(?![\w-])")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the commands read, under the names of the page: two models, its prompts, its task."""
    place = tmp_path_factory.mktemp("readme")
    first, second = (place / "checkpoints" / f"qwen3-8b-{name}" for name in ("sft", "ppo"))
    for path in (first, second):
        tiny_model("llama", path, max_position_embeddings=512)
    changed = {name: tensor * 1.25 for name, tensor in load_file(first / "model.safetensors").items()}
    save_file(changed, second / "model.safetensors", metadata={"format": "pt"})
    rows, task = (
        re.search(r'^(\{"prompt".*?)^```', README, re.DOTALL | re.MULTILINE),
        re.search(r"^```yaml\n(.*?)^```", README, re.DOTALL | re.MULTILINE),
    )
    assert rows
    assert task
    (place / "prompts.jsonl").write_text(rows[1])
    (place / "evaluation").mkdir()
    (place / "evaluation/held_out.yaml").write_text(task[1])
    (place / "evaluation/held_out.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return place


def command(place: Path, *parts: str) -> list[str]:
    """The words of the one command of the page with these parts, its paths below `place`."""
    (line,) = (line for line in COMMANDS if all(part in line for part in parts))
    return shlex.split(PLACE.sub(lambda found: f"{place}/{found[0]}", line))[1:]


def test_prompts_are_answered_and_tasks_go_into_the_card(launcher, place):
    done = launcher(*command(place, "generate --source"))
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in (place / "results/answers/generations.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert "\n" not in rows[0]["completion"]
    assert rows[1]["completion"].startswith("{")

    done = launcher(*command(place, "evaluate --source", "--target results/held-out"))
    assert done.code == 0, done.stderr
    facts = json.loads((place / "results/held-out/manifest.json").read_text())["facts"]
    assert 0 < facts["metrics"]["held_out"]["bits_per_byte"] < 20
    done = launcher(*command(place, "card --source"))
    assert done.code == 0, done.stderr
    assert "bits_per_byte" in (place / "checkpoints/qwen3-8b-sft-measured/README.md").read_text()


def test_a_server_is_measured_and_takes_newer_weights(launcher, place):
    words = command(place, "serve --source", "--reload-from checkpoints")
    words[words.index("--port") + 1] = "0"
    server = Server(launcher, *words)

    def to_it(*parts: str) -> list[str]:
        return [word.replace("http://127.0.0.1:8000/v1", server.url) for word in command(place, *parts)]

    words = to_it("bench http")
    words[words.index("--requests") + 1] = "32"  # and shorter ones: seconds in place of minutes
    done = launcher(*words, "--input-tokens", 16, "--output-tokens", 4)
    assert done.code == 0, done.stderr
    runs = json.loads((place / "results/bench/bench.json").read_text())["runs"]
    assert [run["requests"] for run in runs] == [32, 32, 32]

    asked = {"prompt": "The quick", "max_tokens": 12, "temperature": 0}
    before = call(f"{server.url}/completions", asked)[1]["choices"][0]["text"]
    done = launcher(*to_it("reload http"))
    assert done.code == 0, done.stderr
    assert call(f"{server.url}/policy")[1]["version"] == "qwen3-8b-ppo"
    assert call(f"{server.url}/completions", asked)[1]["choices"][0]["text"] != before
    done = server.stop()
    assert done.code == 0, done.stderr
