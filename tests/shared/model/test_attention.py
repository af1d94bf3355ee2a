import pytest
import torch

from shared.architecture.architecture import Alibi
from shared.kernels.attention import masks, segments, variable_length


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_product_is_the_textbooks(groups, masked, model_of, worker):
    attention = model_of(worker.architecture()).decoder.layers[0].self_attention.core_attention
    query = torch.randn(17, 2, 8, 16)
    key, value = torch.randn(17, 2, groups, 16), torch.randn(17, 2, groups, 16)
    segments = torch.tensor([[1] * 9 + [2] * 8, [1] * 3 + [2] * 10 + [0] * 4])
    allowed = masks.dense(segments) if masked else masks.causal(17, torch.device("cpu"))

    found = attention(query, key, value, segments if masked else None)

    repeated_key, repeated_value = (x.repeat_interleave(8 // groups, dim=2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, repeated_key) / 16**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,kbhd->qbhd", weights, repeated_value).reshape(17, 2, 128)
    # fp32 sums of 17 terms of size 1 in another order.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only(model_of, worker):
    model = model_of(worker.architecture(attention={"dropout": 0.5}))
    attention = model.decoder.layers[0].self_attention.core_attention
    tensors = [torch.randn(8, 1, 4, 32), torch.randn(8, 1, 2, 32), torch.randn(8, 1, 2, 32)]
    assert torch.equal(attention(*tensors, None), attention(*tensors, None))
    attention.train()
    assert not torch.equal(attention(*tensors, None), attention(*tensors, None))


def test_rounded_bias_counts_from_the_start_of_each_text(model_of, worker):
    model = model_of(worker.architecture(attention={"rotary": None, "alibi": Alibi(rounded=True)}))
    ids, positions = torch.randint(64, (1, 700)), torch.arange(700)[None]
    segments = torch.arange(700)[None] // 350
    with torch.no_grad():
        packed = model(ids, positions, segments)
        alone = model(ids[:, 350:], positions[:, :350], None)
    torch.testing.assert_close(packed[:, 350:], alone, atol=1e-5, rtol=0)  # fp32, numbers of size 1


def test_packed_rows_have_no_mask_and_read_their_borders_once(model_of, worker, monkeypatch):
    """Borders are read from the device once for all layers, and not kept longer than the segments."""
    monkeypatch.setattr(masks, "dense", lambda segments: pytest.fail("a mask of whole rows"))
    model = model_of(worker.architecture())
    ids, packed = torch.randint(64, (2, 16)), torch.tensor([[1] * 9 + [2] * 7, [1] * 16])
    read, split, cache = [], variable_length.borders, variable_length._borders
    monkeypatch.setattr(segments, "borders", lambda tensor: read.append(tensor in cache) or split(tensor))
    before = len(cache)
    with torch.no_grad():
        model(ids, torch.arange(16)[None], packed)
    assert len(read) > 1
    assert read == [False] + [True] * (len(read) - 1)
    assert len(cache) == before + 1
    del packed
    assert len(cache) == before
