"""Positions of left-padded rows, where TRL gives none."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tools.rlhf.engines.group_trainers import pass_position_ids


def test_learned_positions_start_at_the_first_token():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    }
    with torch.no_grad():
        alone, before = model(ids).logits, model(**padded).logits[:, 3:]
        pass_position_ids(model)
        after = model(**padded).logits[:, 3:]
    assert (before - alone).abs().max() > 1e-2
    torch.testing.assert_close(after, alone, atol=1e-5, rtol=0)  # float32 sums over another width


def test_rotary_positions_are_left_alone():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    pass_position_ids(model)
    assert not model._forward_pre_hooks
