"""Parsing of --reward."""

import subprocess
import sys

import pytest

from shared.errors import UserError
from tools.rlhf.rewards.spec import parse


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "f.py").write_text("def f(prompts, completions): ...\n")
    return tmp_path


def test_components_with_weights(place):
    first, second = parse("0.5*model:model, -1e-1*py:f.py:f")
    assert (first.weight, str(first.path), first.function, first.name) == (0.5, "model", None, "model")
    assert (second.weight, str(second.path), second.function, second.name) == (-0.1, "f.py", "f", "f")
    assert parse("model:model")[0].weight == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("nothing", "write model:DIR or py:FILE:FUNCTION"),
        ("x*model:model", "'x' is not a finite number"),
        ("nan*model:model", "not a finite number"),
        ("model:absent", "absent"),
        ("py:absent.py:f", "absent.py does not exist"),
        ("py:f.py", "write py:FILE:FUNCTION"),
        ("py:f.py:not-a-name", "write py:FILE:FUNCTION"),
        ("model:model,2*model:model", "names 'model' twice"),
    ],
)
def test_mistakes_are_named(place, text, says):
    with pytest.raises(UserError, match="--reward") as error:
        parse(text)
    assert says in str(error.value)


def test_a_mistake_answers_without_the_heavy_libraries(place):
    code = (
        "import sys\nfrom tools.rlhf.cli import tool\n"
        "try: tool.run(['ppo', '--source=model', '--prompts=f.py', '--reward=py:f.py:2', '--target=t'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'trl', 'deepspeed'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "2 set()\n", answer
    assert "write py:FILE:FUNCTION" in answer.stderr
