"""vLLM's own loader, in the directory it is given, picks the files that transformers would."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path

import pytest

from shared.checkpoint.formats.hugging_face import choose_weights
from shared.errors import UserError
from tools.infer.engines.vllm_directory import directory_for_vllm, shown

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "model-00003-of-00003.safetensors")


def files_of_vllm(directory: Path) -> set[str]:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    _, files, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(directory), None, None, True, None)
    return {Path(file).name for file in files}


@pytest.mark.parametrize("index", ["none", "followed", "stale"])
def test_every_combination_of_weight_files(tmp_path: Path, index: str) -> None:
    """A stale index names files that are not there: vLLM refuses that, transformers reads the whole file."""
    read = 0
    for number, names in enumerate(chain.from_iterable(combinations(FILES, size) for size in range(5))):
        source = tmp_path / str(number)
        source.mkdir()
        for name in ("config.json", "tokenizer.json", *names, *(SHARDS if index == "followed" else ())):
            (source / name).write_text("{}")
        if index != "none":
            (source / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))})
            )
        try:
            chosen = choose_weights(source, "--source")
        except UserError:
            continue
        given = directory_for_vllm(source)
        assert files_of_vllm(given) == {*chosen.files}, names
        assert (given / "tokenizer.json").is_file()
        assert shown(given) == str(source)
        read += 1
    assert read >= 8


def test_a_directory_without_other_weights_is_given_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").write_text("")
    assert directory_for_vllm(tmp_path) == tmp_path
