"""A linear layer in FP8 with its bias and state; layouts are in tests/shared/training/test_fp8_update.py."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from shared.families import registry
from shared.kernels.fp8.matmul import Shards, fp8_linear
from shared.kernels.fp8.tensor_state import LinearState
from shared.model.backend import LocalBackend
from shared.model.fp8_backend import Fp8Backend
from shared.model.fp8_linear import Fp8Linear
from tests.shared.kernels.fp8.examples import recipe


def layers(model_of, name: str, size: str = "qwen2-tiny") -> list[Fp8Linear]:
    architecture = registry.sizes()[size]
    model = model_of(architecture, backend=Fp8Backend(LocalBackend(), recipe(name), architecture.num_layers))
    return [module for module in model.modules() if isinstance(module, Fp8Linear)]


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_a_layer_is_the_product_and_the_bias(name, model_of):
    biased = [each for each in layers(model_of, name, "gpt2-tiny") if each.bias is not None]
    assert {isinstance(each, ColumnParallelLinear) for each in biased} == {True, False}
    for layer in biased[:4]:
        with torch.no_grad():
            layer.bias.normal_()
        x = torch.randn(6, 2, layer.weight.shape[1])
        y, bias = layer(x)
        plain = fp8_linear(x, layer.weight, LinearState(recipe(name)), Shards())
        wanted = plain if layer.skip_bias_add else plain + layer.bias
        assert torch.equal(y, wanted)
        assert (bias is None) != layer.skip_bias_add


def test_the_state_is_numbers_in_the_state_dict(model_of):
    layer, other = layers(model_of, "delayed")[:2]
    assert layer.state_dict()["_extra_state"] is None
    layer.fp8_state.tensors["weights"].history.append(3.0)
    encoded = layer.state_dict()["_extra_state"]
    assert encoded.dtype == torch.float32
    other.set_extra_state(encoded)
    assert other.fp8_state.tensors["weights"].history.values == [3.0]
    other.set_extra_state(None)  # of a run without FP8
    assert other.fp8_state.tensors["weights"].history.values == [3.0]


def test_a_pickle_of_transformer_engine_is_not_opened(model_of, capsys):
    layer = layers(model_of, "delayed")[0]
    layer.set_extra_state(torch.zeros(100, dtype=torch.uint8))
    assert "TransformerEngine are not read" in capsys.readouterr().err
    assert layer.fp8_state.encode() is None
