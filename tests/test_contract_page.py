"""docs/contract.md agrees with the code: kinds, fields, file names, exit codes, version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from shared import errors
from shared.checkpoint.copy.journal import JOURNAL
from shared.checkpoint.directory.manifest import CONTRACT_VERSION, MANIFEST, FileEntry, Kind, Manifest
from shared.checkpoint.directory.open import Checkpoint
from shared.checkpoint.directory.recognition import TRACKER, iteration_name
from shared.checkpoint.directory.run_directory import HF_FILES
from shared.checkpoint.directory.target import PARTIAL, REPLACED, RUN, SHARDS
from shared.checkpoint.formats.hugging_face import LAYOUT
from shared.checkpoint.formats.transformer_engine_reader import LAYERS

PAGE = (Path(__file__).resolve().parents[1] / "docs/contract.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_kinds_and_the_place_of_their_auxiliary_files() -> None:
    table = {spans(row[0])[0]: row[-1] for row in rows("Kinds")}
    assert list(table) == list(get_args(Kind))
    for kind in get_args(Kind):
        if kind != "result":
            place = Checkpoint(path=Path("x"), kind=kind, manifest=None).hf_files.relative_to("x").as_posix()
            assert spans(table[kind])[0].rstrip("/") == place, kind


def test_fields_of_the_manifest() -> None:
    fields = [name for row in rows("manifest.json") for name in spans(row[0])]
    assert fields == list(Manifest.model_fields)
    assert set(FileEntry.model_fields) <= set(spans(rows("manifest.json")[-1][1]))


@pytest.mark.parametrize(
    "name",
    [
        *(MANIFEST, TRACKER, RUN, JOURNAL, LAYOUT, LAYERS, f"{HF_FILES}/"),
        *(f"TARGET{PARTIAL}<id>", f"TARGET{REPLACED}<id>", f"TARGET{SHARDS}4/2-of-4/"),
        *(f"{iteration_name(100)}/", f"{iteration_name(100)}{PARTIAL}<id>"),
    ],
)
def test_names_on_disk(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_version_and_exit_codes() -> None:
    assert f"`contract_version` is {CONTRACT_VERSION}." in PAGE
    codes = [getattr(errors, name) for name in dir(errors) if name.startswith("EXIT_")]
    assert [int(row[0]) for row in rows("Exit codes")] == [*sorted(codes), 130]
