import pytest
import torch

from shared.kernels.attention.variable_length import borders, pack
from tests.references.attention import call

ROWS = torch.tensor([[7, 7, 7, 2, 2, 0, 0], [1, 3, 3, 3, 3, 3, 2]])


def tensors(batch, queries, keys, head_dim=5, value_dim=3):
    shapes = (batch, 4, queries, head_dim), (batch, 2, keys, head_dim), (batch, 2, keys, value_dim)
    return [torch.randn(shape) for shape in shapes]


def test_borders_of_each_row():
    assert borders(ROWS) == [((0, 3), (3, 5), (5, 7)), ((0, 1), (1, 6), (6, 7))]


def test_rows_follow_one_another():
    q, k, v = tensors(2, 7, 7)
    packed = pack(call(q, k, v, ROWS))
    assert packed.lengths.queries_N1.tolist() == [0, 3, 5, 7, 8, 13, 14]
    assert torch.equal(packed.lengths.keys_N1, packed.lengths.queries_N1)
    assert packed.lengths.queries_N1.dtype == packed.lengths.keys_N1.dtype == torch.int32
    assert (packed.lengths.longest_queries, packed.lengths.longest_keys, packed.lengths.square) == (5, 5, True)
    assert torch.equal(packed.q_THW[9, :, :5], q[1, :, 2])
    assert torch.equal(packed.v_TGW[9, :, :3], v[1, :, 2])


def test_heads_are_padded_with_zeros_to_one_width():
    q, k, v = tensors(1, 7, 7, head_dim=9, value_dim=3)
    packed = pack(call(q, k, v, None))
    assert packed.q_THW.shape == (7, 4, 16)
    assert packed.k_TGW.shape == packed.v_TGW.shape == (7, 2, 16)
    assert not packed.q_THW[..., 9:].any()
    assert not packed.v_TGW[..., 3:].any()
    assert torch.equal(packed.unpack(packed.q_THW), q[..., :3])


def test_heads_of_a_kernels_width_are_not_copied():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(1, 7, 7, head_dim=16, value_dim=16))
    packed = pack(call(q, k, v, None))
    assert packed.q_THW.data_ptr() == q.data_ptr()
    assert packed.v_TGW.data_ptr() == v.data_ptr()


def test_later_queries_have_the_keys_of_their_segments():
    """Queries 4 and 5: of row 0 the last token of a segment and the first of the next, of row 1 the middle of one."""
    q, k, v = tensors(2, 2, 6)
    packed = pack(call(q, k, v, ROWS))
    assert packed.lengths.queries_N1.tolist() == [0, 1, 2, 4]
    assert packed.lengths.keys_N1.tolist() == [0, 2, 3, 8]
    assert (packed.lengths.longest_queries, packed.lengths.longest_keys, packed.lengths.square) == (2, 5, False)
    assert torch.equal(packed.k_TGW[..., :5], torch.cat([k[0, :, 3:6], k[1, :, 1:6]], 1).transpose(0, 1))


@pytest.mark.parametrize("start", [0, 3])
def test_one_segment_ends_with_the_last_query(start):
    packed = pack(call(*tensors(2, 4, 4 + start)))
    assert packed.lengths.queries_N1.tolist() == [0, 4, 8]
    assert packed.lengths.keys_N1.tolist() == [0, 4 + start, 8 + 2 * start]
