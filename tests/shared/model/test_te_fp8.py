"""FP8 by TransformerEngine: what is refused, and states of checkpoints. Models are in test_te_backend.py."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from shared.errors import UserError
from shared.families import registry
from shared.model.gpt import transformer_config
from shared.model.te_fp8 import check_sizes, config_fields, obstacle, restore
from shared.parallel import ParallelConfig
from tests.shared.kernels.fp8.examples import recipe

HOPPER, NEW = (9, 0), (12, 9)


def why(name, *, capability=HOPPER, cuda=NEW, pipeline=1, **changes):
    return obstacle(recipe(name, **changes), num_layers=4, pipeline=pipeline, capability=capability, cuda=cuda)


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("tensorwise", {}, None),
        ("tensorwise", {"bf16_layers": (1, 1), "capability": (8, 9), "cuda": (12, 4)}, None),
        ("tensorwise", {"capability": (8, 0)}, "--precision fp8 needs a GPU of compute capability 8.9"),
        ("tensorwise", {"bf16_layers": (3, 0), "pipeline": 2}, "--fp8-bf16-layers 3,0 is more than the 2 layers"),
        ("delayed", {}, None),
        ("delayed", {"bf16_layers": (1, 1)}, "--fp8-recipe delayed of TransformerEngine is for all layers"),
        ("rowwise", {}, "TransformerEngine has no --fp8-recipe rowwise"),
        ("blockwise", {}, None),
        ("blockwise", {"cuda": (12, 8)}, "CUDA 12.9"),
        ("blockwise", {"capability": (8, 9)}, "compute capability 9.0"),
        ("mxfp8", {}, "--fp8-recipe mxfp8 needs a GPU of compute capability 10.x"),
        ("mxfp8", {"capability": (10, 0)}, None),
        ("mxfp8", {"capability": (12, 0)}, "10.x"),
    ],
)
def test_what_a_gpu_does_not_compute_is_named(name, given, part):
    found = why(name, **given)
    assert (found is None) if part is None else (part in found)


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_megatron_core_has_the_recipes_layers(name):
    """Megatron-Core's own function says which layers stay in bf16."""
    architecture = registry.sizes()["tiny"]
    used = recipe(name, amax_history=3, bf16_layers=(0, 0) if name == "delayed" else (1, 0))
    config = transformer_config(architecture, ParallelConfig(), torch.bfloat16, **config_fields(used))
    assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len) == (used.format, name, 3)
    for layer in range(architecture.num_layers):
        assert is_first_last_bf16_layer(config, layer) != used.in_fp8(layer, architecture.num_layers)


class Linear(torch.nn.Linear):
    """As `check_sizes` and `restore` see a module of TransformerEngine."""

    fp8_meta = None

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
        self.loaded = pickle.loads(state.numpy().tobytes())


def chunk(rows):
    """Two layers, the second of `rows` rows."""
    layers = [torch.nn.ModuleDict({"fc": Linear(32, each, bias=False)}) for each in (7, rows)]
    for number, layer in enumerate(layers, 1):
        layer.layer_number = number
    model = torch.nn.Module()
    model.decoder, model.architecture = torch.nn.Module(), SimpleNamespace(num_layers=2)
    model.decoder.layers = torch.nn.ModuleList(layers)
    return model


def test_matrices_that_do_not_fit_are_refused_but_not_in_layers_in_bf16():
    used = recipe("tensorwise", bf16_layers=(1, 0))
    check_sizes([chunk(48)], used, tokens=48)
    with pytest.raises(
        UserError, match=r"multiples of 16, and decoder.layers.1.fc is \[40, 32\]; give --backend local"
    ):
        check_sizes([chunk(40)], used, tokens=48)
    with pytest.raises(
        UserError, match=r"multiples of 16, and a rank has 24 tokens of a micro batch; change --sequence-l"
    ):
        check_sizes([chunk(48)], used, tokens=24)
    with pytest.raises(UserError, match=r"multiples of 32, and decoder.layers.1.fc is \[48, 32\]"):
        check_sizes([chunk(48)], recipe("mxfp8", bf16_layers=(1, 0)), tokens=64)


def state_of(content):
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


KEY = "decoder.layers.0.fc._extra_state"


def test_a_state_is_read_and_the_environment_is_as_before(monkeypatch):
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    model = chunk(48)
    others = {"decoder.layers.1.fc._extra_state": torch.empty(0, dtype=torch.uint8), "decoder.norm._extra_state": None}
    restore(model, {KEY: state_of({"scale_fwd": 2.0}), **others})
    assert model.decoder.layers[0]["fc"].loaded == {"scale_fwd": 2.0}
    assert not hasattr(model.decoder.layers[1]["fc"], "loaded")
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    "state", [state_of(RunsCode()), torch.tensor([1, 2], dtype=torch.uint8)], ids=["code", "noise"]
)
def test_a_state_that_is_none_is_not_opened(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{KEY} of the checkpoint is no FP8 state of .* --precision bf16 --extend"):
        restore(chunk(48), {KEY: state})
    assert not list(tmp_path.iterdir())
