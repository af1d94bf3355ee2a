"""The call of TransformerEngine's DotProductAttention. Numbers, over its contract: `test_every_back_end`."""

import sys

import torch

from shared.kernels.attention import te_attention
from shared.kernels.attention.needs import Features
from tests.references import flash
from tests.references.attention import call


def test_a_module_of_each_size_is_made_once_and_masks_by_the_place_of_the_queries(monkeypatch):
    te_attention._module.cache_clear()
    flash.install_transformer_engine(monkeypatch)
    package = sys.modules["transformer_engine.pytorch"]
    base, made, asked = package.DotProductAttention, [], []

    class Recording(base):
        def __init__(self, **named):
            super().__init__(**named)
            made.append(named)

        def forward(self, *given, **named):
            asked.append((named["attn_mask_type"], named["window_size"]))
            return super().forward(*given, **named)

    monkeypatch.setattr(package, "DotProductAttention", Recording)
    q, k = torch.randn(1, 4, 6, 9), torch.randn(1, 2, 6, 9)
    for start in (0, 0, 2):
        te_attention.attend(call(q[:, :, start:], k, k, None, Features(window=3)))
    te_attention.attend(call(q, k, k, None, Features(scale=0.5)))
    te_attention._module.cache_clear()
    assert asked == [
        ("padding_causal", (2, 0)),
        ("padding_causal", (2, 0)),
        ("padding_causal_bottom_right", (2, 0)),
        ("padding_causal", (-1, 0)),
    ]
    assert [named["softmax_scale"] for named in made] == [9**-0.5, 0.5]
    assert made[0] == {
        "num_attention_heads": 4,
        "kv_channels": 16,
        "num_gqa_groups": 2,
        "attention_dropout": 0.0,
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "softmax_scale": 9**-0.5,
    }
