"""MLA against Megatron-Core's method that it replaces, to the bit; cos and sin are made once a forward."""

from dataclasses import replace

import pytest
import torch

from shared.families import registry
from shared.model import rope
from shared.runtime.extensions import compile_share_storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["deepseek-v3-tiny", "moonlight-tiny"])  # YaRN with q_lora_rank; neither
def test_queries_keys_values_and_gradients_are_megatrons_to_the_bit(size, dtype, model_of, worker):
    architecture = registry.sizes()[size]
    if (rotary := architecture.attention.rotary).scaling:  # DeepSeek V3's factor of cos and sin is 1
        rotary = replace(rotary, scaling=replace(rotary.scaling, mscale_all_dim=0.5))
        architecture = architecture.with_values(attention={"rotary": rotary})
        assert rope.concentration_factor(rotary) > 1.01
    else:
        assert architecture.attention.q_lora_rank is None
    hidden = torch.randn(37, 2, architecture.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = worker.against_megatrons_mla(model_of(architecture, dtype), hidden)
    assert len(ours) == len(theirs) > 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("layout", ["CP 2", "TP 2 SP"])
def test_two_processes_compute_megatrons_queries_keys_and_values_to_the_bit(layout, two_processes):
    tensors, equal, length = two_processes[f"MLA {layout}"]
    assert tensors > 6
    assert equal
    assert length == {"CP 2": 12, "TP 2 SP": 24}[layout]


@pytest.mark.parametrize("recompute", [("none",), ("full",), ("mla_up_proj",)])
def test_cos_and_sin_are_made_once_for_all_layers_and_their_recomputation(recompute, model_of, monkeypatch):
    made, cos_sin = [], rope.cos_sin
    monkeypatch.setattr(rope, "cos_sin", lambda *given: made.append(given) or cos_sin(*given))
    if recompute == ("mla_up_proj",):
        compile_share_storage()
    size = registry.sizes()["moonlight-tiny"]
    model = model_of(size, recompute=recompute).train()
    ids = torch.randint(0, size.vocab_size, (2, 17), generator=torch.Generator().manual_seed(2))
    segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 16])
    assert len(model.decoder.layers) > 1
    for _ in range(2):
        model(ids[:, :-1], torch.arange(16)[None], segments, labels=ids[:, 1:]).mean().backward()
    assert len(made) == 1
