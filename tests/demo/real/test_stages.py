"""The commands of the demo of a real model."""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from real import stages

DEMO = Path(stages.__file__).parents[1]
WORK = Path("demo-real-work")


def test_the_readme_has_the_commands_of_the_stages() -> None:
    text = (DEMO / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = {
        tuple(shlex.split(line))
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    }
    every = stages.stages(WORK, stages.CHOICES)
    commands = [stage.command for stage in every if "tools/" in stage.command[0] and "python" not in stage.command[0]]
    assert len(commands) == 9
    missing = [shlex.join(words) for tool, *words in commands if (Path(tool).name, *words) not in lines]
    assert not missing


def test_trainings_are_chosen_once_each_in_the_order_of_the_demo() -> None:
    assert stages.chosen("grpo,dpo,grpo") == ("dpo", "grpo")
    assert stages.chosen("grpo,sft,dpo") == stages.CHOICES


@pytest.mark.parametrize("choices", [("sft",), ("dpo",), ("grpo",), ("dpo", "grpo"), stages.CHOICES])
def test_a_stage_reads_what_earlier_ones_wrote(choices: tuple[str, ...]) -> None:
    written: list[str] = []
    for stage in stages.stages(WORK, choices):
        paths = [word.rpartition("=")[2] for word in stage.command if f"{WORK}/" in word]
        missing = [path for path in paths if not any(path == one or path.startswith(f"{one}/") for one in written)]
        assert missing == [str(stage.output)], stage.name
        written.append(str(stage.output))
    needed = {f"{WORK}/answers/{asked.file}.json" for choice in choices for asked in stages.ANSWERS[choice]}
    assert needed == {path for path in written if "/answers/" in path}


def test_models_are_asked_by_the_names_of_the_table() -> None:
    served = {
        (name, stage.output.stem)
        for stage in stages.stages(WORK, stages.CHOICES)
        if "ask" in stage.command
        for name in names(stage.command)
    }
    shown = {(asked.model, asked.file) for every in stages.ANSWERS.values() for asked in every}
    assert shown <= served


def names(command: tuple[str, ...]) -> list[str]:
    """Names of a server's models: by default the source's folder."""
    flags = dict(pairwise(command))
    adapters = [flags["--adapter"].partition("=")[0]] if "--adapter" in flags else []
    return [flags.get("--served-model-name", Path(flags["--source"]).name), *adapters]


def test_reward_and_length_are_those_of_the_ends(tmp_path: Path) -> None:
    rows = [{"reward": n / 10, "completions/mean_length": 40 - n} for n in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stages.reward_rose(tmp_path) == "reward 0.20 -> 0.70, 38 -> 33 tokens a reply"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "sft,ppo"], "'ppo' is no training; some of: sft, dpo, grpo"),
        (["--stages", ""], "'' is no training"),
        (["--stages", "dpo", "--until", "sft train"], "--until sft train: no such stage; one of: fetch"),
        (
            ["--stages", "grpo,dpo,grpo", "--until", "x"],
            "rlhf dpo, serve and ask (dpo), rlhf grpo, serve and ask (grpo)\n",
        ),
        (["--source", "/"], "--source /: no Hugging Face directory"),
    ],
)
def test_wrong_flags_are_said_and_nothing_is_written(tmp_path: Path, words: list[str], said: str) -> None:
    command = [sys.executable, str(DEMO / "real"), "--work", str(tmp_path / "work"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "work").exists()
