import torch

from shared.kernels.attention import masks


def test_mask_is_causal_and_stays_within_segments():
    mask = masks.dense(torch.tensor([[1, 1, 2, 0], [3, 3, 3, 3]]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert torch.equal(mask[1, 0], torch.ones(4, 4).tril().bool())


def test_every_position_sees_itself():
    mask = masks.dense(torch.randint(0, 3, (4, 33)))
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_positions_count_from_the_start_of_each_segment():
    segments = torch.tensor([[7, 7, 7, 2, 2, 0, 0], [1, 3, 3, 3, 3, 3, 2]])
    positions, starts = masks.positions_and_starts(segments)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5, 5], [0, 1, 1, 1, 1, 1, 6]]
    # A query attends to itself and what is in front of it in its segment.
    assert torch.equal(masks.dense(segments)[:, 0].sum(-1) - 1, positions)


def test_a_window_is_causal():
    mask = masks.window(4, 2, torch.device("cpu"))
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(masks.window(5, 5, torch.device("cpu")), masks.causal(5, torch.device("cpu")))
    segments = torch.tensor([[1, 1, 1, 2, 2]])
    both = masks.dense(segments) & masks.window(5, 2, torch.device("cpu"))
    assert both.sum() < masks.dense(segments).sum()
    assert torch.equal(masks.shared_dense(segments), masks.dense(segments))
    assert masks.shared_dense(segments) is masks.shared_dense(segments)


def test_the_last_queries_are_the_last_rows_of_a_window():
    for keys, queries, size in ((5, 2, 3), (7, 7, 2), (4, 1, 9)):
        whole = masks.window(keys, size, torch.device("cpu"))
        assert torch.equal(masks.window(keys, size, torch.device("cpu"), queries), whole[:, :, keys - queries :])


def test_prefixes_are_attended_to_by_their_whole_segment():
    starts, ends = torch.tensor([[0, 0, 0, 0, 4, 4]]), torch.tensor([[2, 2, 2, 2, 5, 5]])
    mask = masks.dense(masks.prefix_segments(starts, ends))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
