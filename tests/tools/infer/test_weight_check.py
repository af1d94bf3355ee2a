"""What may replace a server's weights, and every reason why a directory does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tools.infer.weight_check import OutsideFolderError, ServedWeights, below

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def newer(models, tmp_path):
    """A directory with other numbers, which is taken."""
    path = shutil.copytree(models("llama"), tmp_path / "newer")
    change(path, lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    return path


def change(path: Path, edit) -> None:
    weights = path / "model.safetensors"
    save_file(edit(load_file(weights)), weights, metadata={"format": "pt"})


def fields(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=4))


def test_a_directory_with_other_numbers_is_taken(models, newer):
    served = ServedWeights.read(models("llama"))
    (file,) = served.check(newer)
    assert (file.path, file.size) == (str(newer / "model.safetensors"), os.stat(newer / "model.safetensors").st_size)
    fields(newer / "config.json", transformers_version="9.9", pretraining_tp=1)
    fields(newer / "generation_config.json", transformers_version="9.9")
    assert served.check(newer), "notes of the writer count"
    for other in newer.iterdir():
        if other.suffix != ".safetensors":
            other.unlink()
    assert served.check(newer), "weights alone"


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_nan(value):
    def edit(tensors):
        tensors[NAME][3, 5] = value
        return tensors

    return edit


WEIGHTS = {
    "lacks model.layers.1.mlp.down_proj.weight": without(NAME),
    "has other, which .* has not": lambda tensors: tensors | {"other": torch.ones(2)},
    r"is \[64, 95\], the server's is \[64, 96\]": lambda tensors: tensors | {NAME: tensors[NAME][:, 1:].contiguous()},
    "is BF16, the server's is F32": lambda tensors: tensors | {NAME: tensors[NAME].bfloat16()},
    "down_proj.weight has numbers that are NaN": with_nan(float("nan")),
    "down_proj.weight has numbers that are NaN or infinite": with_nan(float("-inf")),
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_are_not_taken(message, models, newer):
    change(newer, WEIGHTS[message])
    with pytest.raises(UserError, match=message):
        ServedWeights.read(models("llama")).check(newer)


def cut(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def as_bin(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def rope(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    fields(path / "config.json", rope_parameters=config["rope_parameters"] | {"rope_theta": 5.0})


DIRECTORIES = {
    "is not a directory": shutil.rmtree,
    "holds no model.safetensors": lambda path: (path / "model.safetensors").unlink(),
    "is truncated": cut,
    "only safetensors": as_bin,
    "is another architecture: .*5.0": rope,
    "eos_token_id is 3": lambda path: fields(path / "config.json", eos_token_id=3),
    "dtype is 'bfloat16'": lambda path: fields(path / "config.json", dtype="bfloat16"),
    "config.json is not JSON": lambda path: (path / "config.json").write_text("{"),
    "generation_config.json is not the file": lambda path: fields(path / "generation_config.json", top_k=3),
    "chat_template.jinja is not the file": lambda path: (path / "chat_template.jinja").write_text("{{ other }}"),
    "tokenizer.json is not the file": lambda path: fields(path / "tokenizer.json", version="2.0"),
    "manifest": lambda path: (path / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("message", DIRECTORIES)
def test_directories_that_are_not_taken(message, models, newer):
    DIRECTORIES[message](newer)
    with pytest.raises(UserError, match=message):
        ServedWeights.read(models("llama")).check(newer)


def test_a_directory_that_is_being_written_is_not_taken(models, newer):
    partial = newer.rename(newer.with_name("newer.partial-1"))
    with pytest.raises(UserError, match="is incomplete"):
        ServedWeights.read(models("llama")).check(partial)


def test_an_unknown_family_is_compared_field_by_field(models, newer, tmp_path):
    start = shutil.copytree(models("llama"), tmp_path / "start")
    for path in (start, newer):
        fields(path / "config.json", model_type="of_ours")
    assert ServedWeights.read(start).check(newer)
    fields(newer / "config.json", of_ours=1)
    with pytest.raises(UserError, match="of_ours is 1, the server's is None"):
        ServedWeights.read(start).check(newer)


def test_the_start_is_what_it_was_at_the_start(models, newer, tmp_path):
    """A trainer may remove the directory that a server was started with."""
    start = shutil.copytree(models("llama"), tmp_path / "start")
    served = ServedWeights.read(start)
    shutil.rmtree(start)
    assert served.check(newer)


def test_only_what_is_below_the_folder_is_read(tmp_path):
    folder, elsewhere = tmp_path / "policies", tmp_path / "elsewhere"
    (folder / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    (tmp_path / "same").symlink_to(folder)
    assert below(str(folder / "a"), folder) == below(str(folder / "a"), tmp_path / "same") == folder / "a"
    assert below(str(tmp_path / "same/a"), folder) == folder / "a"
    assert below(str(folder / "absent"), folder) == folder / "absent"
    for path in (folder, folder / "../elsewhere", folder / "link", elsewhere, "a", folder.with_name("policies-2")):
        with pytest.raises(OutsideFolderError, match="is not below"):
            below(str(path), folder)
