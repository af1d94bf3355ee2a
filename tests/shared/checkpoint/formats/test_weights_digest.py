"""Equal tensors have one digest, however they are stored; any other name, dtype, shape or bit has another."""

import json

import torch
from safetensors.torch import save_file

from shared.checkpoint.formats.weights_digest import weights_digest

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5, dtype=torch.bfloat16)}


def written(path, *shards):
    path.mkdir()
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
        return path
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, path / name)
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def test_equal_tensors_have_one_digest(tmp_path):
    whole = written(tmp_path / "whole", TENSORS)
    split = written(tmp_path / "split", {"b.weight": TENSORS["b.weight"]}, {"a.weight": TENSORS["a.weight"]})
    assert weights_digest(whole) == weights_digest(split)


def test_every_difference_is_another_digest(tmp_path):
    one = TENSORS["a.weight"].clone()
    one.view(torch.int32)[2, 3] ^= 1  # the last bit of the last number
    others = [
        TENSORS,
        TENSORS | {"a.weight": one},
        TENSORS | {"a.weight": TENSORS["a.weight"].reshape(4, 3)},
        TENSORS | {"b.weight": TENSORS["b.weight"].view(torch.float16)},
        {"a.weight": TENSORS["a.weight"], "c.weight": TENSORS["b.weight"]},
    ]
    assert len({weights_digest(written(tmp_path / str(i), other)) for i, other in enumerate(others)}) == len(others)
