"""`--gradient-checkpointing`: the same loss and gradients to the bit, with fewer bytes kept for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3MoeConfig

from shared.errors import UserError
from tools.rlhf.engines.recomputed_layers import recompute_layers
from tools.rlhf.models import keep_in_evaluation_mode

LAYERS = 3
CONFIGS = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=64),  # dropout 0.1
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32,
    ),
    "bloom": BloomConfig(hidden_size=32, n_layer=LAYERS, n_head=4, vocab_size=64, hidden_dropout=0.1),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
    ),
}  # fmt: skip


def loss_and_gradients(model, ids):
    kept: set[int] = set()
    size = 0

    def pack(tensor):
        nonlocal size
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept and not isinstance(tensor, torch.nn.Parameter):
            kept.add(storage.data_ptr())
            size += storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss  # with the configuration's cache
        before_backward = size
    loss.backward()
    return (
        loss.item(),
        {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None},
        before_backward,
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_gradients_are_the_same_with_less_kept(family):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[family])
    recomputed = copy.deepcopy(plain)
    for model in (plain, recomputed):
        keep_in_evaluation_mode(model)
        model.train()
    assert recompute_layers(recomputed) == LAYERS
    ids = torch.randint(3, 64, (4, 24))
    loss, gradients, kept = loss_and_gradients(plain, ids)
    again, others, fewer = loss_and_gradients(recomputed, ids)
    assert again == loss
    assert gradients.keys() == others.keys()
    assert all(torch.equal(others[name], each) for name, each in gradients.items())
    assert fewer < 0.6 * kept
    with torch.no_grad():  # a cache is used
        replies = [
            model.generate(ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
            for model in (plain, recomputed)
        ]
    assert torch.equal(*replies)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="--gradient-checkpointing: Linear of transformers has no layers"):
        recompute_layers(torch.nn.Linear(2, 2))
