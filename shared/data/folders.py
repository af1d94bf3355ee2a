"""Files of a folder of data: as `datasets` saved it (`save_to_disk`), as it lies on the Hugging Face hub, or any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from shared.errors import UserError

CARDS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # of `datasets`: no data


def folder_files(folder: Path, *, split: str | None, flag: str) -> list[Path]:
    """The data files of a folder, in order of their relative paths, or in the order that `datasets` recorded.

    Hidden files and folders inside it (a leading dot) are left out.

    Args:
        folder: the folder.
        split: the files of this split only: a split that `datasets` saved, or files and folders that have the word in
            their name (`data/train-00000-of-00002.parquet`).
        flag: its flag, for errors.

    Raises:
        UserError: there is no such split; there are several saved ones and none is named.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = [str(name) for name in _object(folder / "dataset_dict.json", flag).get("splits", [])]
        if split is None and len(splits) != 1:
            raise UserError(
                f"{flag} {folder} has the splits {', '.join(splits)}; give the folder of one ({folder / 'SPLIT'}), or "
                "--split where there is the flag"
            )
        if split is not None and split not in splits:
            raise UserError(f"--split {split}: {folder} has {', '.join(splits)}")
        return _saved(folder / (split or splits[0]), flag)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        saved_as = _object(folder / "state.json", flag).get("_split")
        if split is not None and split != saved_as:
            raise UserError(f"--split {split}: {folder} is the split {saved_as}; leave --split out")
        return _saved(folder, flag)
    inside = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if split is not None:
        word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])")
        inside = [file for file in inside if any(word.search(part) for part in file.relative_to(folder).parts)]
        if not inside:
            raise UserError(f"--split {split}: no file in {flag} {folder} has this word in its name")
    return sorted(inside, key=lambda file: file.relative_to(folder).parts)


def _saved(folder: Path, flag: str) -> list[Path]:
    """The files of one saved split, in the order of its rows."""
    state = _object(folder / "state.json", flag)
    if state.get("_indices_data_files"):
        raise UserError(f"{flag} {folder} holds a selection of rows; save it again after flatten_indices()")
    files = [folder / str(entry["filename"]) for entry in state.get("_data_files", [])]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{flag} {missing[0]} is missing, though state.json names it")
    return files


def _object(path: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read ({error}); save the data set again") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} is not a JSON object; save the data set again")
    return content
