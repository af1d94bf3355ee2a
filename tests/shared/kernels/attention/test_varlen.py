"""The call of torch's variable-length attention. Numbers of all features: `test_every_back_end`."""

import pytest
import torch
from torch.nn.attention import varlen as torchs

from shared.kernels.attention import varlen
from shared.kernels.attention.needs import Features
from tests.references import flash
from tests.references.attention import call


@pytest.fixture
def on_cpu():
    library = flash.register_for_torch()
    yield
    library._destroy()


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (1, (0, 0)), (128, (127, 0))])
def test_a_window_counts_the_querys_own_key_and_a_kernels_does_not(window, expected):
    assert varlen.flash_window(window) == expected


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_query_attends_to_as_many_keys_as_the_window_has(window, on_cpu):
    """All keys alike and values one-hot: the output is the mean over the keys attended to."""
    q = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    v = torch.eye(8, dtype=torch.float64)[None, None]
    out = varlen.attend(call(q, q, v, None, Features(window=window)))[0, 0]
    assert (out > 0).sum(1).tolist() == [min(row + 1, window) for row in range(8)]
    assert (out > 0).diagonal().all()


def test_the_scale_is_that_of_the_heads_before_padding(on_cpu, monkeypatch):
    asked = []
    kernel = torchs.varlen_attn
    monkeypatch.setattr(torchs, "varlen_attn", lambda *given, **named: asked.append(named) or kernel(*given, **named))
    q = torch.randn(1, 4, 6, 9)
    k = torch.randn(1, 2, 6, 9)
    varlen.attend(call(q, k, k, None, Features()))
    varlen.attend(call(q, k, k, None, Features(scale=0.5, window=3)))
    assert [named["scale"] for named in asked] == [9**-0.5, 0.5]
    assert [named["window_size"] for named in asked] == [(-1, 0), (2, 0)]
    assert all(named["enable_gqa"] for named in asked)
