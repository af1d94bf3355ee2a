"""The calls of flash-attn 2. Numbers of all features, over its contract: `test_every_back_end`."""

import sys

import torch

from shared.kernels.attention import flash_attention_2
from shared.kernels.attention.needs import Features
from tests.references import flash
from tests.references.attention import call


def test_the_function_is_called_with_everything_by_name(monkeypatch):
    flash.install_flash_attn_2(monkeypatch)
    asked = []

    def function(q, k, v, **named):
        asked.append((q.shape, k.shape, named))
        return q

    interface = sys.modules["flash_attn.flash_attn_interface"]
    monkeypatch.setattr(interface, "flash_attn_varlen_func", function)
    q, k = torch.randn(1, 4, 6, 9, dtype=torch.bfloat16), torch.randn(1, 2, 6, 9, dtype=torch.bfloat16)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.bfloat16)
    features = Features(window=3, softcap=30.0, slopes_H=slopes, dropout=0.1)
    found = flash_attention_2.attend(call(q, k, k, torch.tensor([[1, 1, 2, 2, 2, 2]]), features))
    ((q_shape, k_shape, named),) = asked
    assert torch.equal(found, q)
    assert (q_shape, k_shape) == ((6, 4, 16), (6, 2, 16))
    assert named.pop("cu_seqlens_q").tolist() == named.pop("cu_seqlens_k").tolist() == [0, 2, 6]
    assert torch.equal(named.pop("alibi_slopes"), slopes.float())
    assert named == {
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
        "dropout_p": 0.1,
        "softmax_scale": 9**-0.5,
        "causal": True,
        "window_size": (2, 0),
        "softcap": 30.0,
    }


def test_it_is_unavailable_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash_attention_2.cannot_import.cache_clear()
    assert "flash_attn" in flash_attention_2.unavailable()
    flash_attention_2.cannot_import.cache_clear()
    flash.install_flash_attn_2(monkeypatch)
    assert flash_attention_2.unavailable() is None
    flash_attention_2.cannot_import.cache_clear()
