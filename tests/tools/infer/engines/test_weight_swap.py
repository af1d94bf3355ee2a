"""The two steps of an exchange, in a worker that notes what it is given."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tools.infer.engines import weight_swap
from tools.infer.engines.weight_swap import WeightSwap


class Tied(torch.nn.Module):
    pass


class Worker(WeightSwap):
    loaded: dict[str, torch.Tensor]
    complaint: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.experts = torch.nn.Linear(1, 1)
        self.experts.quant_method = SimpleNamespace(moe_kernel="packs once")
        self.experts.cpu_linear = None
        self.tied = Tied()
        self.tied.weight = self.experts.weight
        self.tied.cpu_linear = None
        self.tied.quant_method = SimpleNamespace(process_weights_after_loading=self.pack)

    def pack(self, layer: torch.nn.Module) -> None:
        assert layer is self.tied
        layer.packed = sorted(self.loaded)

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Sequential(self.experts, self.tied)

    def reload_weights(self, weights_iterator) -> None:
        self.kernel = self.experts.quant_method.moe_kernel
        self.loaded = dict(weights_iterator)
        if self.complaint:
            logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").warning(*self.complaint)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """Without vLLM, whose import takes long."""
    monkeypatch.setattr(weight_swap, "on_cpu", lambda: True)


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


def test_layers_that_keep_their_old_weights_are_an_error(file):
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    before = logger.level, list(logger.handlers)
    worker = Worker()
    worker.complaint = ("%s: Failed to load weights", "Linear")
    worker.baton_open([stamp(file)])
    with pytest.raises(RuntimeError, match="vLLM has not loaded the weights of Linear"):
        worker.baton_swap()
    # vLLM's other warnings, and layers without parameters of their own (tables of RoPE, a tied head)
    for complaint in (("Allocating %.1f MB", 1.0), ("%s: Failed to load weights", "Tied")):
        worker.complaint = complaint
        worker.baton_open([stamp(file)])
        worker.baton_swap()
    assert (logger.level, list(logger.handlers)) == before


def test_on_a_cpu_the_kernel_of_experts_is_made_again(file, monkeypatch):
    for cpu, kernel in ((False, "packs once"), (True, None)):
        monkeypatch.setattr(weight_swap, "on_cpu", lambda cpu=cpu: cpu)
        worker = Worker()
        worker.baton_open([stamp(file)])
        worker.baton_swap()
        assert worker.kernel == kernel


def test_a_tied_head_is_packed_again_after_the_weights_have_come(file):
    worker = Worker()
    worker.baton_open([stamp(file)])
    worker.baton_swap()
    assert worker.tied.packed == ["a", "b"]


def test_what_is_not_as_checked_is_not_opened(file, tmp_path):
    worker = Worker()
    given = stamp(file)
    os.utime(file, ns=(1, 1))
    assert "has changed since it was checked" in worker.baton_open([given])
    file.unlink()
    assert "cannot be read by a worker: No such file" in worker.baton_open([given])
    with pytest.raises(KeyError):
        worker.baton_swap()
