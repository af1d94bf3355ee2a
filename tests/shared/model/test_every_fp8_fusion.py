"""Models whose FP8 linear layers compute SwiGLU and norms themselves, against the same models with modules of their own.

What a GPU does with Triton; here by torch's operations, with the same codes.
"""

from __future__ import annotations

import pytest
import torch

from shared.families import registry
from shared.model import fp8_linear, weights
from shared.model.backend import LocalBackend
from shared.model.backend_choice import choose_backend
from shared.model.fp8_backend import Fp8Backend
from shared.model.fp8_linear import Fp8NormLinear, GateAndUp
from tests.shared.kernels.fp8.examples import recipe
from tests.shared.model.test_fp8_backend import inputs

# Norms of attention and MLP; zero-centred, GELU; MLA with dense and MoE layers; gated delta net.
SIZES = ("qwen3-tiny", "gemma-tiny", "deepseek-v3-tiny", "qwen3-next-tiny")


def of_key(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by the key of a checkpoint: the same with norms apart."""
    (entries,) = weights.sharded_state_dict([chunk]).values()
    parameters = dict(chunk.named_parameters())
    return {getattr(entries[name], "key", name): parameter for name, parameter in parameters.items() if name in entries}


def results(chunk: torch.nn.Module, architecture) -> dict[str, torch.Tensor]:
    """The loss of each token, and gradients by key."""
    chunk.train()
    loss = chunk(**inputs(architecture))
    loss.sum().backward()
    return {"loss": loss.detach(), **{key: each.grad for key, each in of_key(chunk).items() if each.grad is not None}}


@pytest.mark.parametrize("size", SIZES)
def test_a_model_is_to_the_bit_that_of_the_modules(size, model_of, monkeypatch):
    architecture = registry.sizes()[size]
    found = {}
    read: list[type] = []
    apart = None
    for together in (False, True):
        monkeypatch.setattr(fp8_linear, "fuses", lambda device, dtype: together)  # noqa: B023
        backend = Fp8Backend(
            LocalBackend(), recipe("blockwise", bf16_layers=(0, 1)), architecture.num_layers, joins_norms=together
        )
        chunk = model_of(architecture, dtype=torch.bfloat16, backend=backend)
        if apart is not None:
            keys, theirs = of_key(chunk), of_key(apart)
            assert keys.keys() == theirs.keys()
            for key, parameter in keys.items():
                parameter.data.copy_(theirs[key].data)
            for module in chunk.modules():
                if isinstance(module, fp8_linear.Fp8Linear):
                    module.register_forward_pre_hook(lambda each, given: read.append(type(given[0])))
        apart = chunk
        joined = [module for module in chunk.modules() if isinstance(module, Fp8NormLinear)]
        assert bool(joined) == together
        assert not any(module.layer == architecture.num_layers - 1 for module in joined)
        found[together] = results(chunk, architecture)
    assert (GateAndUp in read) == (size in ("qwen3-tiny", "deepseek-v3-tiny"))
    assert found[True].keys() == found[False].keys()
    assert [key for key, each in found[True].items() if not torch.equal(each, found[False][key])] == []


def test_norms_are_joined_on_a_gpu_without_adapters():
    architecture, given = registry.sizes()["tiny"], {"attention_backend": None, "fp8": recipe("rowwise"), "pipeline": 1}
    norm = architecture.layers[0].norm
    for device, adapters in (("cuda", False), ("cuda", True), ("cpu", False)):
        backend, _ = choose_backend("local", architecture, device_type=device, adapters=adapters, **given)
        joined = backend.column_parallel_layer_norm_linear(norm, 1)
        assert (joined is not None) == (device == "cuda" and not adapters)
    assert registry.sizes()["mpt-tiny"].layers[0].norm.kind == "layernorm"
    assert (
        Fp8Backend(LocalBackend(), recipe("rowwise"), 2, joins_norms=True).column_parallel_layer_norm_linear(
            registry.sizes()["mpt-tiny"].layers[0].norm, 0
        )
        is None
    )
