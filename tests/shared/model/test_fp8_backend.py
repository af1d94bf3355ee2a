"""Which layers of a model are in FP8, and that what derives from them composes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn import functional

from shared.families import registry
from shared.model.backend import LocalBackend
from shared.model.fp8_backend import Fp8Backend
from shared.model.fp8_linear import Fp8Linear, fp8_class
from shared.model.router import Router
from tests.shared.kernels.fp8.examples import recipe

# Every kind of mixer and MLP, and MTP.
SIZES = ("qwen3-tiny", "mpt-tiny", "qwen3-moe-tiny", "qwen2-moe-tiny", "deepseek-v3-tiny", "qwen3-next-tiny")


def inputs(architecture):
    ids = torch.randint(architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    depth = architecture.mtp.depth if architecture.mtp else 0
    labels = torch.stack([ids] * (1 + depth)) if depth else ids
    return {"input_ids": ids, "position_ids": torch.arange(24)[None], "attention_mask": None, "labels": labels}


@pytest.mark.parametrize("name", SIZES)
def test_linear_layers_are_in_fp8_and_nothing_else(name, model_of):
    architecture = registry.sizes()[name]
    backend = Fp8Backend(LocalBackend(), recipe("delayed", bf16_layers=(1, 0)), architecture.num_layers)
    model = model_of(architecture, backend=backend)
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            seen[path] = isinstance(module, Fp8Linear)
        assert not isinstance(module, Router | torch.nn.Embedding) or not isinstance(module, Fp8Linear)
    inside = {path: fp8 for path, fp8 in seen.items() if path.startswith(("decoder.", "mtp."))}
    assert {path: fp8 for path, fp8 in inside.items() if fp8 == path.startswith("decoder.layers.0.")} == {}
    assert not any(fp8 for path, fp8 in seen.items() if path not in inside)
    assert any(inside.values())
    layers = {module.layer for module in model.modules() if isinstance(module, Fp8Linear)}
    assert layers == {*range(1, architecture.num_layers + architecture.mtp_depth)}
    model.train()
    model(**inputs(architecture)).sum().backward()
    # Every layer was computed in FP8, in both directions; a routed expert may have had no token.
    for path, module in model.named_modules():
        if isinstance(module, Fp8Linear) and not module.is_expert:
            assert all(tensor.take() for tensor in module.fp8_state.tensors.values()), path


def test_all_else_is_the_inner_backends():
    architecture = registry.sizes()["qwen3-moe-tiny"]
    inner = LocalBackend(attention_backend="eager")
    backend = Fp8Backend(inner, recipe("tensorwise"), architecture.num_layers)
    assert backend.attention_backend == "eager"
    assert backend.core_attention() is inner.core_attention()
    assert backend.embedding() is inner.embedding()
    assert backend.output_layer() is inner.output_layer()
    norm = architecture.layers[0].norm
    assert type(backend.norm(norm, extra_state=True)) is type(inner.norm(norm, extra_state=True))
    assert len(backend.qk_norms(architecture.attention, norm)) == 2


class Doubled:
    """As an adapter: adds to the output of the class below, whatever it is."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        return super()._forward_impl(input, weight, *args, **kwargs) + functional.linear(input, weight)


@cache
def adapted(base):
    return type(f"Doubled{base.__name__}", (Doubled, base), {})


class Adapters(Fp8Backend):
    """Adapters on an FP8 base."""

    def column_parallel_linear(self, layer, *, expert=False):
        return adapted(super().column_parallel_linear(layer, expert=expert))

    def row_parallel_linear(self, layer, *, expert=False):
        return adapted(super().row_parallel_linear(layer, expert=expert))


@pytest.mark.parametrize("name", ["qwen3-tiny", "qwen3-moe-tiny"])
def test_an_adapter_adds_to_a_frozen_layer_in_fp8(name, model_of):
    architecture = registry.sizes()[name]
    model = model_of(architecture, backend=Adapters(LocalBackend(), recipe("blockwise"), architecture.num_layers))
    weights = [module.weight for module in model.modules() if isinstance(module, Fp8Linear)]
    for weight in weights[::2]:
        weight.requires_grad_(False)
    model.train()
    model(**inputs(architecture)).sum().backward()
    assert all(weight.grad is None for weight in weights[::2])
    assert all(weight.grad is not None for weight in weights[1::2])


def test_a_class_is_made_once():
    used = recipe("tensorwise")
    one = fp8_class(ColumnParallelLinear, used, 3, "column")
    assert fp8_class(ColumnParallelLinear, recipe("tensorwise"), 3, "column") is one
    assert fp8_class(ColumnParallelLinear, used, 4, "column") is not one
    assert (one.__name__, one.layer, one.direction) == ("Fp8ColumnParallelLinear", 3, "column")
