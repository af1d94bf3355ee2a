"""The two steps of an exchange, in a worker that notes what it is given."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from tools.infer.engines.weight_swap import WeightSwap


class Worker(WeightSwap):
    loaded: dict[str, torch.Tensor]

    def reload_weights(self, weights_iterator) -> None:
        self.loaded = dict(weights_iterator)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path)
    return path


def stamp(path):
    state = path.stat()
    return str(path), state.st_size, state.st_mtime_ns


def test_what_is_open_is_loaded_though_it_is_deleted(file):
    worker = Worker()
    assert worker.baton_open([stamp(file)]) == ""
    file.unlink()
    worker.baton_swap()
    assert sorted(worker.loaded) == ["a", "b"]
    assert torch.equal(worker.loaded["a"], torch.arange(3.0))
    with pytest.raises(KeyError):
        worker.baton_swap()  # each exchange opens its files


def test_what_is_not_as_checked_is_not_opened(file, tmp_path):
    worker = Worker()
    given = stamp(file)
    os.utime(file, ns=(1, 1))
    assert "has changed since it was checked" in worker.baton_open([given])
    file.unlink()
    assert "cannot be read by a worker: No such file" in worker.baton_open([given])
    with pytest.raises(KeyError):
        worker.baton_swap()
