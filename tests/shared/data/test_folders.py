"""Folders as `datasets` saves them, as the hub has them, and others: which files, in which order."""

import json
from pathlib import Path

import pytest

from shared.data.folders import folder_files
from shared.data.sources import rows_of
from shared.errors import UserError

ROWS = [{"n": number} for number in range(5)]


def _read(folder: Path) -> list[dict[str, int]]:
    return [row.value for row in rows_of(folder, flag="--source")]


def test_what_datasets_saved_is_read_in_its_order(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.shuffle(seed=0).save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert _read(tmp_path / "one") == list(made.shuffle(seed=0))
    both = datasets.DatasetDict({"train": made, "test": made.select([3])})
    both.save_to_disk(str(tmp_path / "both"))
    assert _read(tmp_path / "both/test") == ROWS[3:4]
    for split, count in (("train", 5), ("test", 1)):
        files = folder_files(tmp_path / "both", split=split, flag="--source")
        assert sum(len([*rows_of(file, flag="")]) for file in files) == count
    datasets.DatasetDict({"only": made}).save_to_disk(str(tmp_path / "only"))
    assert _read(tmp_path / "only") == ROWS


def test_mistakes_name_the_splits(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"--source .* has the splits train, test; give the folder of one"):
        folder_files(tmp_path, split=None, flag="--source")
    with pytest.raises(UserError, match=r"--split dev: .* has train, test"):
        folder_files(tmp_path, split="dev", flag="--source")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        folder_files(tmp_path, split="test", flag="--source")
    saved = tmp_path / "test"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    state = {"_split": "test", "_data_files": [{"filename": "a.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"a\.arrow is missing, though state\.json names it"):
        folder_files(saved, split=None, flag="--source")
    with pytest.raises(UserError, match=r"--split train: .* is the split test; leave --split out"):
        folder_files(saved, split="train", flag="--source")
    (saved / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UserError, match=r"holds a selection of rows; save it again after flatten_indices\(\)"):
        folder_files(saved, split=None, flag="--source")
    (saved / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state\.json is not a JSON object"):
        folder_files(saved, split=None, flag="--source")


def test_a_split_of_other_folders_is_a_word_in_a_name(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("trained.jsonl", "test/a.jsonl", "test/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {
        split: [str(file.relative_to(tmp_path)) for file in folder_files(tmp_path, split=split, flag="--source")]
        for split in ("train", "test", None)
    }
    assert found["train"] == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert found["test"] == ["data/test-0.parquet", "test/a.jsonl"]
    assert found[None] == sorted({*found["train"], *found["test"], "trained.jsonl"})
    with pytest.raises(UserError, match="--split dev: no file in --source .* has this word in its name"):
        folder_files(tmp_path, split="dev", flag="--source")
