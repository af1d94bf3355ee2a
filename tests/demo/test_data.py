"""The demo's data from a small library: held-out modules, real and damaged bodies, determinism."""

import json
import random
from pathlib import Path

import data
import pytest
from damage import KINDS, damaged
from reward import parses

MODULE = '''"""Module {name}."""

class Thing:
    def double(self, value):
        """Twice the {name}.

        And more.
        """
        # why
        return value * len("{name}")

    def without(self):
        return 1

def {name}_sum(items: list, *, start=0) -> int:
    """Sum of items."""
    for item in items:
        start += item
    return start

def nothing():
    """Does nothing."""
    pass
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for number in range(60):
        (root / f"package{number}").mkdir(parents=True)
        for part in ("one", "two"):
            text = MODULE.format(name=f"word{number}{part}") * 12
            (root / f"package{number}" / f"{part}.py").write_text(text)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text("x = 1")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    return root


def _rows(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_module_is_on_both_sides(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    counts = data.write(library, out)
    train = {file.relative_to(out / "train").parts[0] for file in (out / "train").rglob("*.py")}
    held_out = {f"package{number}" for number in range(60)} - train
    assert train
    assert held_out
    text = "".join(row["text"] for row in _rows(out / "heldout.jsonl"))
    assert "word" in text
    for number in range(60):
        assert f"word{number}one" not in text or f"package{number}" in held_out
        for name, side in (("sft.jsonl", train), ("sft-heldout.jsonl", held_out)):
            assert (f"word{number}one" in (out / name).read_text()) == (f"package{number}" in side)
    assert counts["functions"] == 4 * len(train)
    assert counts["heldout_functions"] == 4 * len(held_out)
    assert not (out / "train" / "test").exists()


def test_pairs_are_real_functions_and_damaged_ones_are_others(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    data.write(library, out)
    rows = _rows(out / "preferences.jsonl")
    requests = [row["prompt"][-1]["content"] for row in rows]
    chosen, rejected = ([row[side][0]["content"] for row in rows] for side in ("chosen", "rejected"))
    assert parses(requests, chosen) == [1.0] * len(rows)
    assert all(a != b for a, b in zip(chosen, rejected, strict=True))
    assert sum(parses(requests, rejected)) < len(rows) / 2
    conversations = _rows(out / "sft.jsonl")
    assert [c["messages"][0]["content"] for c in conversations] == requests
    assert [c["messages"][1]["content"] for c in conversations] == chosen
    assert [row["messages"][0]["content"] for row in _rows(out / "prompts.jsonl")] == requests
    assert '    # why\n    return value * len("word0one")' in chosen


def test_the_same_library_gives_the_same_files(library: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.write(library, tmp_path / name)
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert len(files) > 100
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_kill_leaves_nothing_that_looks_finished(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(library))
    whole = data.write

    def killed(library: Path, directory: Path) -> dict[str, int]:
        whole(library, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        data.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(data, "write", whole)
    data.main(tmp_path / "out")
    data.main(tmp_path / "out")
    assert "already done" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "out" / "tasks").iterdir()} == {
        "heldout.yaml",
        "replies.yaml",
        "reward.py",
    }
    assert not (tmp_path / "out.new").exists()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_damage_damages(kind: object) -> None:
    body = "    if (a[0]):\n        return b(c)\n    return {}"
    results = {kind(body, random.Random(seed)) for seed in range(20)}  # type: ignore[operator]
    assert len(results - {body}) >= 2


@pytest.mark.parametrize("body", ["    x", "    return a", "    f()\n    f()"])
def test_even_a_small_body_is_damaged(body: str) -> None:
    for seed in range(50):
        assert damaged(body, random.Random(seed)).strip() != body.strip()
        assert damaged(body, random.Random(seed)) == damaged(body, random.Random(seed))
