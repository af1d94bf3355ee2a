"""The call of flash-attn 3. Numbers of all features, over its contract: `test_every_back_end`."""

import sys

import pytest
import torch

from shared.kernels.attention import flash_attention_3
from shared.kernels.attention.needs import Features
from tests.references import flash
from tests.references.attention import call


@pytest.mark.parametrize("with_lse", [False, True])
def test_the_function_is_called_with_its_arguments_by_name(with_lse, monkeypatch):
    """First releases return the log-sum-exp, asked or not."""
    flash.install_flash_attn_3(monkeypatch)
    asked = []

    def function(q, k, v, **named):
        asked.append(named)
        return (q, torch.zeros(4, 6)) if with_lse else q

    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", function)
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 6, 8)
    found = flash_attention_3.attend(call(q, k, k, None, Features(scale=0.5, window=3, softcap=30.0)))
    (named,) = asked
    assert torch.equal(found, q)
    assert named.pop("cu_seqlens_q").tolist() == [0, 4]
    assert named.pop("cu_seqlens_k").tolist() == [0, 6]
    assert named == {
        "max_seqlen_q": 4,
        "max_seqlen_k": 6,
        "softmax_scale": 0.5,
        "causal": True,
        "window_size": (2, 0),
        "softcap": 30.0,
    }
