"""Activation recomputation by module: the same gradients, by running the module twice; what a model has not is refused."""

from functools import reduce

import pytest
import torch

from shared.errors import UserError
from shared.families import registry
from shared.model.recompute import check_recompute
from shared.runtime.extensions import compile_share_storage

# Modules chosen, on a model: the modules of its last layer that then run twice, by their names in Megatron-Core.
RUN_TWICE = [
    ("qwen3-tiny", ("core_attn",), ["self_attention.core_attention"]),
    ("qwen3-tiny", ("mlp",), ["mlp"]),
    ("qwen3-tiny", ("mlp", "core_attn"), ["mlp", "self_attention.core_attention"]),
    ("deepseek-v3-tiny", ("moe",), ["mlp.experts"]),
    ("deepseek-v3-tiny", ("shared_experts", "mla_up_proj"), ["mlp.shared_experts", "self_attention.linear_kv_up_proj"]),
]


@pytest.mark.parametrize(("size", "chosen", "modules"), RUN_TWICE)
def test_a_module_that_is_recomputed_runs_twice_and_gives_the_same_gradients(size, chosen, modules, model_of):
    architecture = registry.sizes()[size]
    check_recompute(chosen, architecture)
    if "mla_up_proj" in chosen:
        compile_share_storage()
    ids = torch.randint(0, architecture.vocab_size, (2, 17), generator=torch.Generator().manual_seed(2))
    gradients, calls = [], []
    for how in (("none",), chosen):
        model = model_of(architecture, recompute=how).train()
        counts = dict.fromkeys(modules, 0)
        for name in modules:
            module = reduce(getattr, name.split("."), model.decoder.layers[-1])

            def count(*given, name=name, counts=counts):
                counts[name] += 1

            module.register_forward_hook(count)
        model(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:]).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(counts)
    assert calls == [dict.fromkeys(modules, 1), dict.fromkeys(modules, 2)]
    for kept, recomputed in zip(*gradients, strict=True):
        # The same operations; autograd may add the gradients that meet in one tensor in another order.
        torch.testing.assert_close(kept, recomputed, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "chosen", "message"),
    [
        ("qwen3-tiny", ("full", "mlp"), "--recompute full,mlp: full stands alone"),
        ("qwen3-tiny", ("mlp", "none"), "none stands alone"),
        ("qwen3-tiny", ("mlp", "moe"), "--recompute mlp,moe: moe needs a model with MoE layers; leave moe out"),
        ("qwen3-tiny", ("mla_up_proj",), "needs a model with MLA"),
        ("qwen3-moe-tiny", ("shared_experts",), "needs a model with shared experts"),
        ("qwen3-moe-tiny", ("mlp",), "needs a model with dense layers"),
        ("gemma2-tiny", ("mlp",), "needs a model with norms before attention and MLP, added to the residual only"),
    ],
)
def test_what_contradicts_the_model_is_refused(size, chosen, message):
    with pytest.raises(UserError, match=message):
        check_recompute(chosen, registry.sizes()[size])


def test_what_stood_alone_before_is_taken_for_every_model():
    for architecture in registry.sizes().values():
        for chosen in ("none", "selective", "full"):
            check_recompute((chosen,), architecture)
