"""The demo's verdict: what it asks for, and what it says about the length of replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import verdict

SHORTER = "PPO made replies shorter"


def scored(work: Path, *, pretrained: float = 2.0, sft: tuple[float, float], ppo: tuple[float, float]) -> Path:
    """A work directory whose models have these bits per byte, and share of replies that parse with their mean length."""
    (work / "unigram.json").write_text(json.dumps({"byte_unigram": 5.0, "token_unigram": 4.0}))
    for name, bits, (share, characters) in (
        ("init", 8.0, (0.0, 90.0)),
        ("pretrained", pretrained, (0.1, 80.0)),
        ("sft", 2.0, sft),
        ("ppo", 2.0, ppo),
    ):
        found = {
            "heldout": {"bits_per_byte,none": bits},
            "replies": {"parses,samples": share, "characters,samples": characters},
        }
        (work / "scores" / name).mkdir(parents=True)
        (work / "scores" / name / "results.json").write_text(json.dumps({"results": found}))
    return work


@pytest.mark.parametrize(("characters", "shorter"), [(60.5, True), (61.0, False), (75.0, False)])
def test_shorter_replies_are_said_beside_the_rise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], characters: float, shorter: bool
) -> None:
    assert verdict(scored(tmp_path, sft=(0.3, 61.0), ppo=(0.6, characters))) == 0
    said = capsys.readouterr().out
    assert (SHORTER in said) == shorter
    if shorter:
        assert f"{SHORTER}, 61 to 60 characters" in said
        assert "its rise is not all skill" in said
    assert f"ppo                        60.0%  {characters:5.1f} characters" in said


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"ppo": (0.3, 70.0)}, "PPO raises the parse rate: 30.0% to 30.0%"),
        ({"pretrained": 3.3}, "pretraining beats the unigram model: 3.300 below 3.200"),
    ],
)
def test_what_is_missed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, missed: str
) -> None:
    assert verdict(scored(tmp_path, **{"sft": (0.3, 61.0), "ppo": (0.6, 70.0)} | changes)) == 1
    assert f"NO   {missed}" in capsys.readouterr().out
