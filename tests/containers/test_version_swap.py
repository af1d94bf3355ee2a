"""One tool of another version: directories pass between versions; a newer contract version is refused with a clear message."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "contract-1"
USER = 1234

Build = Callable[..., str]
Run = Callable[..., subprocess.CompletedProcess[str]]
Hashes = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="module")
def bumped(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """convert, built from a copy of the tree in which it has another version, and maybe another contract."""

    def make(version: str, contract: int | None = None) -> str:
        tree = tmp_path_factory.mktemp("tree")
        for part in ("shared", "containers", "tools/convert"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
        shutil.copy(ROOT / ".dockerignore", tree)
        _replace(tree / "tools/convert/pyproject.toml", r'^version = ".*"$', f'version = "{version}"')
        if contract is not None:
            _replace(
                tree / "shared/checkpoint/directory/manifest.py",
                r"^_OF_MODELS_AND_DATA = \d+$",
                f"_OF_MODELS_AND_DATA = {contract}",
            )
        image = build("convert", SOURCE_TREE=str(tree), LATEST="no")
        assert image == f"convert:{version}"
        return image

    return make


def _replace(file: Path, pattern: str, text: str) -> None:
    changed, count = re.subn(pattern, text, file.read_text(), flags=re.MULTILINE)
    assert count == 1
    file.write_text(changed)


@pytest.fixture(scope="module")
def newer(bumped: Callable[..., str]) -> str:
    return bumped("0.2.0.dev1")


@pytest.fixture
def golden(work: Path) -> Path:
    """The golden directories, the caller's, under /data/golden."""
    shutil.copytree(GOLDEN, work / "golden")
    for path in ((work / "golden"), *(work / "golden").rglob("*")):
        os.chown(path, USER, USER)
    return work / "golden"


def made_by(directory: Path) -> str:
    manifest = json.loads((directory / "manifest.json").read_text())
    return f"{manifest['tool']} {manifest['version']} {manifest['image']}"


def test_each_version_reads_what_the_other_wrote(
    convert: str, newer: str, docker: Run, hashes: Hashes, golden: Path, work: Path
) -> None:
    older_version, newer_version = convert.partition(":")[2], newer.partition(":")[2]
    assert docker(newer, "--version").stdout.strip() == newer_version != older_version
    for writer, reader, name in ((convert, newer, "up"), (newer, convert, "down")):
        docker(writer, "to-megatron", "--source", "/data/golden/hf", "--target", f"/data/{name}-mg")
        docker(reader, "inspect", f"/data/{name}-mg")
        words = ("--source", "/data/golden/hf", "--target", f"/data/{name}-mg")
        docker(reader, "verify", *words, "--no-logits")
        docker(reader, "to-hf", "--source", f"/data/{name}-mg", "--target", f"/data/{name}-hf")
        assert made_by(work / f"{name}-mg") == f"convert {writer.partition(':')[2]} {writer}"
        assert made_by(work / f"{name}-hf") == f"convert {reader.partition(':')[2]} {reader}"
        assert hashes(work / f"{name}-hf") == hashes(golden / "hf")
    assert hashes(work / "up-mg") == hashes(work / "down-mg")


def test_a_stage_already_done_by_the_other_version_is_not_done_again(
    convert: str, newer: str, docker: Run, golden: Path, work: Path
) -> None:
    words = ("to-megatron", "--source", "/data/golden/hf", "--target", "/data/mg")
    docker(convert, *words)
    before = (work / "mg" / "manifest.json").read_bytes()
    assert "already done" in docker(newer, *words).stderr
    assert (work / "mg" / "manifest.json").read_bytes() == before


def test_one_tool_is_exchanged_in_the_middle_of_the_road(
    convert: str, newer: str, docker: Run, native: Run, hashes: Hashes, golden: Path, work: Path
) -> None:
    """to-megatron by one version of convert, training by pretrain, to-hf by the other version, and back again."""
    for first, last, name in ((convert, convert, "plain"), (convert, newer, "up"), (newer, convert, "down")):
        docker(first, "to-megatron", "--source", "/data/golden/hf", "--target", f"/data/{name}-mg")
        native(
            *("pretrain", "train", "--source", work / f"{name}-mg", "--data", golden / "dataset"),
            *("--target", work / f"{name}-trained", "--sequence-length", 32, "--steps", 2, "--global-batch-size", 2),
            *("--precision", "fp32", "--validate-every", 0),
        )
        for path in (work / f"{name}-trained").rglob("*"):
            os.chown(path, USER, USER)
        docker(last, "to-hf", "--source", f"/data/{name}-trained", "--target", f"/data/{name}-hf")
        assert made_by(work / f"{name}-hf").startswith(f"convert {last.partition(':')[2]} ")
    assert hashes(work / "up-hf") == hashes(work / "plain-hf") == hashes(work / "down-hf")
    assert hashes(work / "up-hf")["model.safetensors"] != hashes(golden / "hf")["model.safetensors"], "it was trained"


def test_a_directory_of_a_newer_contract_is_refused_by_name(
    convert: str, bumped: Callable[..., str], docker: Run, golden: Path, work: Path
) -> None:
    future = bumped("0.3.0.dev2", contract=3)
    docker(future, "init", "--size", "tiny", "--target", "/data/future")
    done = docker(convert, "to-megatron", "--source", "/data/future", "--target", "/data/mg", code=2)
    assert done.stderr.count("\n") == 1
    assert "--source /data/future has contract_version 3, and this tool reads 2" in done.stderr
    assert "upgrade this tool to the version in its manifest.json" in done.stderr
    assert sorted(path.name for path in work.iterdir()) == ["future", "golden"]


def test_golden_directories_of_every_contract_are_read_by_both(
    convert: str, newer: str, docker: Run, hashes: Hashes, golden: Path, work: Path
) -> None:
    for number, image in enumerate((convert, newer)):
        docker(image, "to-hf", "--source", "/data/golden/megatron", "--target", f"/data/hf-{number}")
        assert hashes(work / f"hf-{number}") == hashes(golden / "hf")
        for name in ("hf", "megatron"):
            assert "llama" in docker(image, "inspect", f"/data/golden/{name}").stdout
