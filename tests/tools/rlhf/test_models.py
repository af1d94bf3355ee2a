"""Critics of language models: their head reads what the body gives, whatever its layers' width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tools.rlhf.models import load_critic

OPT = {"ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({"hidden_size": 16, "word_embed_proj_dim": 16}, 16),
        ({"hidden_size": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False}, 8),  # OPT 350M's form
    ],
)
def test_the_head_is_as_wide_as_what_the_body_gives(tmp_path: Path, sizes: dict[str, Any], width: int) -> None:
    config = transformers.OPTConfig(**OPT, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "policy")
    transformers.OPTForSequenceClassification(transformers.OPTConfig(**OPT, **sizes, num_labels=1)).save_pretrained(
        tmp_path / "reward"
    )
    ids = torch.arange(6)[None] + 2
    for name in ("policy", "reward"):
        critic = load_critic(tmp_path / name, torch.float32, vocab_size=32)
        assert critic.head.in_features == width
        values = critic(ids, torch.ones_like(ids), torch.arange(6)[None])
        assert values.shape == (1, 6)
        assert bool(values.any()) == (name == "reward")
