"""Datasets: every token in its position, with the right multiplicity."""

from collections import Counter

import numpy as np
import pytest
import torch

from shared.data.indexed import IndexedWriter
from shared.data.labels import IGNORE
from shared.errors import UserError
from shared.training.blend import Blend
from shared.training.data import BlendedSequences, IndexedSequences, PackedSequences

LENGTHS = [5, 1, 17, 30, 2, 9, 64, 3]


@pytest.fixture
def documents(tmp_path):
    """A prefix, and the documents: token 1000 * d + i is the i-th of document d, so each says where it is from."""
    documents = [1000 * index + np.arange(length) for index, length in enumerate(LENGTHS)]
    writer = IndexedWriter(tmp_path / "train", np.dtype(np.uint16))
    writer.add(np.concatenate(documents), LENGTHS)
    writer.close()
    return tmp_path / "train", documents


def test_validation_reads_the_stream_as_stored_with_every_token_once_a_target(documents):
    prefix, stored = documents
    stream = np.concatenate(stored)
    data = IndexedSequences(prefix, 16, seed=None)
    assert len(data) == -(-(len(stream) - 1) // 16)
    batch = data.batch(np.arange(len(data)))
    labels = batch.labels.flatten()
    assert torch.equal(labels[labels != IGNORE], torch.from_numpy(stream[1:]))
    inputs = batch.tokens.flatten()[labels != IGNORE]
    assert torch.equal(inputs, torch.from_numpy(stream[:-1]))
    assert int(batch.tokens.min()) >= 0  # what fills up the last sample is a token, too


def test_training_samples_are_pieces_of_shuffled_whole_documents(documents):
    prefix, stored = documents
    data = IndexedSequences(prefix, 16, seed=1)
    assert len(data) == (sum(LENGTHS) - 1) // 16
    followers = Counter()
    targets = []
    for position in range(len(data)):
        batch = data.batch(np.array([position]))
        tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
        assert tokens[1:] == labels[:-1]
        targets += labels
        for token, label in zip(tokens, labels, strict=True):
            document, place = divmod(token, 1000)
            if place + 1 < len(stored[document]):
                assert label == token + 1
            else:
                assert label % 1000 == 0  # the next document from its beginning
                followers[document] += 1
    assert len(set(targets)) == len(targets)  # no token is a target twice in an epoch


def test_epochs_differ_seeds_differ_and_both_are_repeatable(documents):
    prefix, _ = documents

    def epoch(seed: int, index: int) -> list[list[int]]:
        data = IndexedSequences(prefix, 16, seed=seed)
        return data.batch(np.arange(len(data)) + index * len(data)).tokens.tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


def test_a_batch_across_an_epoch_is_its_samples(documents):
    prefix, _ = documents
    data = IndexedSequences(prefix, 16, seed=1)
    positions = np.arange(len(data) - 2, len(data) + 2)
    together = data.batch(positions).tokens
    alone = [IndexedSequences(prefix, 16, seed=1).batch(np.array([position])).tokens[0] for position in positions[::-1]]
    assert torch.equal(together, torch.stack(alone[::-1]))


def test_the_computed_order_has_the_same_samples_of_other_documents(documents):
    """Every token but those of the last, incomplete sample is a target once in an epoch, and epochs differ."""
    prefix, stored = documents
    data = IndexedSequences(prefix, 16, seed=1, order="scattered")
    epochs = [data.batch(np.arange(len(data)) + epoch * len(data)) for epoch in (0, 1)]
    for batch in epochs:
        labels = batch.labels.flatten().tolist()
        assert len(set(labels)) == len(labels) == len(data) * 16
        assert set(labels) < set(np.concatenate(stored).tolist())
    assert not torch.equal(epochs[0].labels, epochs[1].labels)
    again = IndexedSequences(prefix, 16, seed=1, order="scattered").batch(np.arange(len(data)))
    assert torch.equal(again.labels, epochs[0].labels)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_document_mask_numbers_documents_and_drops_their_first_tokens(documents, seed):
    prefix, _ = documents
    plain, masked = (IndexedSequences(prefix, 16, seed=seed, document_mask=mask) for mask in (False, True))
    for position in range(len(plain)):
        before, after = plain.batch(np.array([position])), masked.batch(np.array([position]))
        assert before.segments is None
        assert torch.equal(before.tokens, after.tokens)
        sample = torch.cat([before.tokens[0], before.labels[0, -1:]])
        real = before.labels[0] != IGNORE
        same = sample[1:] // 1000 == sample[:-1] // 1000
        assert torch.equal(after.labels[0], torch.where(real & same, before.labels[0], IGNORE))
        tokens, segments = after.tokens[0], after.segments[0]
        inside = torch.cat([torch.tensor([True]), real[:-1]])  # padding is no document
        changes = (tokens[1:] // 1000 != tokens[:-1] // 1000)[inside[1:]]
        assert torch.equal((segments[1:] != segments[:-1])[inside[1:]], changes)
        assert set(segments[~inside].tolist()) <= {0}
    targets = torch.cat([masked.batch(np.array([p])).labels.flatten() for p in range(len(masked))])
    if seed is None:
        assert int((targets != IGNORE).sum()) == sum(LENGTHS) - len(LENGTHS)


def test_a_blend_is_its_sources_in_their_own_orders(documents, packed_like):
    prefix, _ = documents
    first, second = (IndexedSequences(prefix, 16, seed=1, document_mask=True), packed_like)
    data = BlendedSequences(Blend.of(["a", "b"], [len(first), len(second)], [0.6, 0.4]), [first, second])
    batch = data.batch(np.arange(10))
    found = [row for row in batch.tokens if int(row[0]) < 60000]
    assert torch.equal(torch.stack(found), first.batch(np.arange(6)).tokens)
    others = [index for index, row in enumerate(batch.tokens) if int(row[0]) >= 60000]
    assert torch.equal(batch.segments[others], second.batch(np.arange(4)).segments)
    again = torch.cat([data.batch(np.array([position])).labels for position in range(10)])
    assert torch.equal(again, batch.labels)


@pytest.fixture
def packed_like(tmp_path):
    """Packed rows of 16 tokens that no document has."""
    for part in ("tokens", "labels", "segments"):
        np.save(tmp_path / f"train.{part}.npy", 60000 + np.arange(112).reshape(7, 16).astype(np.int32))
    return PackedSequences(tmp_path, "train", seed=3)


def test_data_shorter_than_a_sequence_is_the_users_mistake(documents):
    with pytest.raises(UserError, match="--sequence-length"):
        IndexedSequences(documents[0], sum(LENGTHS), seed=1)


@pytest.fixture
def packed(tmp_path):
    rng = np.random.default_rng(1)
    for part in ("tokens", "labels", "segments"):
        np.save(tmp_path / f"train.{part}.npy", rng.integers(0, 50, (7, 8)).astype(np.int32))
    return tmp_path


def test_packed_rows_come_once_per_epoch_with_their_labels_and_segments(packed):
    data = PackedSequences(packed, "train", seed=3)
    batch = data.batch(np.arange(7, 14))
    stored = {part: np.load(packed / f"train.{part}.npy") for part in ("tokens", "labels", "segments")}
    order = [int(np.flatnonzero((stored["tokens"] == row.numpy()).all(1))[0]) for row in batch.tokens]
    assert sorted(order) == list(range(7))
    assert order != list(range(7))
    assert np.array_equal(batch.labels, stored["labels"][order])
    assert np.array_equal(batch.segments, stored["segments"][order])


def test_packed_validation_keeps_the_order(packed):
    batch = PackedSequences(packed, "train", seed=None).batch(np.array([2, 3]))
    assert np.array_equal(batch.tokens, np.load(packed / "train.tokens.npy")[2:4])


def test_packed_parts_that_differ_in_shape_are_refused(packed):
    np.save(packed / "train.labels.npy", np.zeros((6, 8), np.int32))
    with pytest.raises(UserError, match="differ in shape"):
        PackedSequences(packed, "train", seed=1)
