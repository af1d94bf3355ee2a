"""Adapters on an FP8 base: outputs, gradients of the input, of A and of B, against the formulas of a dequantised base in float64.

y = deq(x) deq(W)^T + s (x A^T) B^T        dx = deq(g) deq(W) + s (g B) A
dA = s (g B)^T x                            dB = s g^T (x A^T)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.families import registry
from shared.kernels.fp8.codes import E4M3, E5M2
from shared.mapping.adapters import LoraSettings
from shared.model import gpt, lora
from shared.model.backend import LocalBackend
from shared.model.experts import GroupedExperts
from shared.model.fp8_backend import Fp8Backend
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from tests.shared.kernels.fp8.examples import recipe
from tests.shared.kernels.fp8.test_matmul import rounded

SETTINGS = LoraSettings(rank=4, alpha=8.0, rslora=False, dropout=0.0, targets=("all-linear",))


def adapted(size: str, name: str) -> list[Any]:
    """A model whose base is in FP8, with adapters that are not zero."""
    process_groups.initialize(ParallelConfig(), 1)
    architecture = replace(registry.sizes()[size], mtp=None)
    backend = Fp8Backend(LocalBackend(), recipe(name), architecture.num_layers)
    chunks = gpt.build(
        architecture, ParallelConfig(), dtype=torch.float32, perform_initialization=True, backend=backend
    )
    for parameter in chunks[0].parameters():
        parameter.requires_grad_(False)
    lora.attach(chunks, SETTINGS, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in lora.adapted_modules(chunks):
        module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) / 10)
    return chunks


@pytest.mark.parametrize("size", ["tiny", "qwen3-moe-tiny"])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise"])
def test_an_adapted_layer_is_that_of_the_formulas(size, name, monkeypatch):
    chunks = adapted(size, name)
    ids = torch.arange(24)[None]
    grouped = chunks[0](ids, ids, None)
    # One expert after another: hooks look at the layers of each. Its numbers are those of all experts at once.
    monkeypatch.setattr(GroupedExperts, "_obstacle", lambda self, x: "the test looks at each expert")
    assert torch.equal(grouped, chunks[0](ids, ids, None))
    seen: dict[Any, dict[str, torch.Tensor]] = {}

    def look(module: Any, given: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
        x, y = given[0], output[0]
        kept = seen.setdefault(module, {"x": x.detach(), "y": y.detach()})
        y.register_hook(lambda gradient: kept.update(g=gradient))

    modules = list(lora.adapted_modules(chunks))
    handles = [module.register_forward_hook(look) for module in modules]
    logits = chunks[0](ids, ids, None)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for handle in handles:
        handle.remove()
    two = modules[0].recipe.power_of_two_scales
    gradient = E5M2 if modules[0].recipe.format == "hybrid" else E4M3
    checked = 0
    for module, found in seen.items():
        x, y, g = (found[key].flatten(0, -2) for key in ("x", "y", "g"))
        if not len(x):  # an expert without tokens
            continue
        a, mixed, scale = module.lora_A.double(), module._mixed().detach().double(), SETTINGS.scale

        def q(tensor: torch.Tensor, dtype: torch.dtype = E4M3, rows: int = 1) -> torch.Tensor:
            return rounded(tensor, dtype, name, rows, two)

        low = x.double() @ a.t()
        weight = module.weight.detach()
        of_mixed = scale * g.double().t() @ low
        pairs = {
            "y": (y, q(x) @ q(weight, rows=128).t() + scale * low @ mixed.t()),
            "dA": (module.lora_A.grad, scale * (g.double() @ mixed).t() @ x.double()),
            "dB": (module.lora_B.grad, torch.autograd.grad(module._mixed(), module.lora_B, of_mixed.float())[0]),
        }
        exact_dx = q(g, gradient) @ q(weight.t(), rows=128).t() + scale * (g.double() @ mixed) @ a
        pairs["dx"] = (_of_layer(module, x, g), exact_dx)
        for what, (ours, exact) in pairs.items():
            # fp32 sums of at most a few hundred numbers, beside the largest.
            assert (ours.double() - exact).abs().max() <= 2e-6 * exact.abs().max(), (module.linear.module, what)
            checked += 1
        assert module.weight.grad is None
    assert checked >= 4 * 8


def _of_layer(module: Any, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The gradient of the input of a layer alone: in the model the input may have other readers."""
    given = x[:, None].clone().requires_grad_()
    (of_x,) = torch.autograd.grad(module(given)[0], given, g[:, None])
    return of_x[:, 0]
