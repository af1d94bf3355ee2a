from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from shared.architecture.architecture import LearnedPositions, PrefixLM
from shared.errors import UserError
from shared.kernels.attention import masks
from shared.model.prefix_lm import prefix_inputs, with_blank
from shared.model.rope import PrefixRotaryAngles
from shared.runtime.device import select_device

START, GMASK, MASK = 91, 92, 93
PREFIX = PrefixLM(start_token=START, blank_tokens=(GMASK, MASK))
ROW = [5, MASK, 6, GMASK, START, 7, 8]  # of several blanks the first kind's


def published(row, blank):
    """As THUDM's get_masks and get_position_ids have it: place, place in the filling, and 1 where a key is seen."""
    length = row.index(START)
    filled = len(row) - length
    sees = [[int(key <= query or key < length) for key in range(len(row))] for query in range(len(row))]
    return [*range(length), *[blank] * filled], [*[0] * length, *range(1, filled + 1)], sees


@pytest.mark.parametrize(("row", "blank"), [(ROW, 3), ([5, MASK, 6, MASK, START, 7], 1), ([START, GMASK, 5], 1)])
def test_positions_and_mask_are_the_published_ones(row, blank):
    streams, seen = prefix_inputs(PREFIX, torch.tensor([row]), None, None)
    found = (*streams[:, 0].tolist(), masks.dense(seen)[0, 0].int().tolist())
    assert found == published(row, blank)


def test_places_count_on_behind_some_blanks():
    counting = replace(PREFIX, counted_tokens=(GMASK,))
    rows = torch.tensor([[5, GMASK, START, 7, 8], [5, MASK, START, 7, 8]])
    assert prefix_inputs(counting, rows, None, None)[0][0].tolist() == [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize(("row", "blank"), [([5, MASK, 6, GMASK, START, 7, MASK], 1), ([GMASK, 5, MASK, START], 0)])
def test_the_earliest_blank_is_the_published_one(row, blank):
    """As the GLM of 2021's tokenizer has it: the first place of any kind, in the text in front of the start."""
    streams, seen = prefix_inputs(replace(PREFIX, earliest=True), torch.tensor([row]), None, None)
    found = (*streams[:, 0].tolist(), masks.dense(seen)[0, 0].int().tolist())
    assert found == published(row, blank)


def test_a_blank_behind_the_start_is_none():
    row = torch.tensor([[5, 6, START, 7, GMASK]])
    prefix_inputs(PREFIX, row, None, None)
    with pytest.raises(UserError, match="no mask token"):
        prefix_inputs(replace(PREFIX, earliest=True), row, None, None)


def test_packed_segments_are_rows_of_their_own():
    other = [GMASK, START, 9]
    ids = torch.tensor([ROW + other + [0, 0]])
    segments = torch.tensor([[1] * len(ROW) + [2] * len(other) + [0, 0]])
    labels = torch.where(segments == 0, -100, ids)
    streams, seen = prefix_inputs(PREFIX, ids, segments, labels)
    mask = masks.dense(seen)
    for row, blank, start in ((ROW, 3, 0), (other, 0, len(ROW))):
        here = slice(start, start + len(row))
        found = (*streams[:, 0, here].tolist(), mask[0, 0, here, here].int().tolist())
        assert found == published(row, blank)
    assert torch.equal(mask & ~(segments[:, None, :, None] == segments[:, None, None, :]), torch.zeros_like(mask))


@pytest.mark.parametrize("row", [[5, 6, START, 7], [5, GMASK, 6, 7]], ids=["no mask token", "no start token"])
def test_rows_that_the_published_code_refuses(row):
    with pytest.raises(UserError, match=r"no mask token \(id 92 or 93\) or no start token \(id 91\)"):
        prefix_inputs(PREFIX, torch.tensor([row]), None, None)


@pytest.fixture
def glm(worker):
    return worker.architecture(
        attention={"head_dim": 16},
        rotary={"fp16_frequencies": True},
        norm={"kind": "layernorm", "bias": True},
        residual={"kind": "normed", "input_multiplier": 3.0},
        prefix=replace(PREFIX, position_streams=2),
    )


def test_tokens_are_made_into_rows_that_can_be_read(glm):
    ids = torch.zeros(2, 64, dtype=torch.long)
    prefix_inputs(PREFIX, with_blank(ids, glm), None, None)
    assert with_blank(ids, replace(glm, prefix=None)) is ids


def test_both_positions_have_a_table(model_of, worker):
    """The embedded token, and of each of its places the row of the own table, summed in float64; for packed rows, too."""
    learned = worker.architecture(
        attention={"rotary": None},
        embedding={"positions": LearnedPositions()},
        prefix=replace(PREFIX, position_streams=2),
    )
    model = model_of(learned).double()
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs, given: seen.append(given), with_kwargs=True)
    other = [GMASK, START, 9]
    ids, segments = torch.tensor([ROW + other]), torch.tensor([[1] * len(ROW) + [2] * len(other)])
    model(ids, None, segments)
    rows = zip(published(ROW, 3)[:2], published(other, 0)[:2], strict=True)
    text, filling = (torch.tensor(one + two) for one, two in rows)
    parts = model.embedding
    assert parts.position_embeddings.weight.shape[0] == learned.max_position_embeddings + 1
    expected = parts.word_embeddings.weight[ids[0]] + parts.position_embeddings.weight[text]
    expected = expected + parts.position_embeddings.filling.weight[filling]
    torch.testing.assert_close(seen[0]["hidden_states"][:, 0], expected, atol=1e-12, rtol=0)


def test_residuals_are_what_norms_made(model_of, glm):
    select_device()
    layer = model_of(glm).decoder.layers[0].double()
    x, angles = torch.randn(9, 2, 64, dtype=torch.float64), torch.randn(9, 2, 1, 16, dtype=torch.float64)
    found, _ = layer(x, None, angles)

    def norm(x, module):
        return torch.nn.functional.layer_norm(x, (64,), module.weight, module.bias, glm.layers[0].norm.epsilon)

    x = norm(x, layer.input_layernorm)
    x = norm(3.0 * x + layer.self_attention(x, None, rotary_pos_emb=angles)[0], layer.pre_mlp_layernorm)
    torch.testing.assert_close(found, 3.0 * x + layer.mlp(x)[0], atol=1e-12, rtol=0)


def test_halves_of_heads_are_rotated_by_their_own_positions(model_of, glm, monkeypatch):
    """Of each half, elements i and i + 4 of 8 are a complex number that turns by position * frequency, in float64."""
    attention = model_of(glm).decoder.layers[0].self_attention.double()
    positions = torch.stack([torch.randint(2048, (2, 9)) for _ in range(2)])
    attention.angles = PrefixRotaryAngles(glm.attention.rotary, 8)(positions, None).double()
    assert attention.angles.shape == (9, 2, 1, 16)
    x = torch.randn(9, 2, 4, 16, dtype=torch.float64)
    frequencies = (10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)).half().double()
    monkeypatch.setattr(SelfAttention, "get_query_key_value_tensors", lambda self: (x, -x, x))
    found, of_key, value = attention.get_query_key_value_tensors()
    assert torch.equal(of_key, -found)
    assert value is x
    for half, places in enumerate(positions):
        part, ours = (t[..., 8 * half : 8 * half + 8] for t in (x, found))
        angles = places.T[:, :, None, None] * frequencies
        turned = torch.complex(part[..., :4], part[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        # Angles of up to 2048 radians in fp32: half of 2^-13.
        torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], -1), atol=5e-4, rtol=0)
