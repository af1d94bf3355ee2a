"""`--document-mask`: rows of several documents against one document at a time, in float64.

The reference knows no rows of documents: every document, cut where a row ends, is a batch of its own without segments.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from shared.architecture.architecture import MTP
from shared.data.indexed import IndexedWriter
from shared.data.labels import IGNORE
from shared.families import registry
from shared.model.gpt import build
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize
from shared.training.data import IndexedSequences
from shared.training.loss import mtp_labels, token_loss

LENGTHS = [5, 1, 17, 60, 2, 9, 33, 3, 24, 24, 1, 40]  # of documents: within a row, over its end, over several rows
ROW = 24
VOCAB = 64


def tiny(size: str, **values):
    """A tiny model of a family, with few tokens."""
    return replace(registry.sizes()[size], vocab_size=VOCAB, **values)


LLAMA = tiny("tiny")
ARCHITECTURES = {
    "rotary": LLAMA,
    "learned positions": tiny("gpt2-tiny"),
    "alibi": tiny("bloom-tiny"),
    "mtp": replace(LLAMA.with_values(head={"tied": False}), mtp=MTP(depth=2, layer=LLAMA.layers[0])),
    "gated delta net": tiny("qwen3-next-tiny", mtp=None),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A prefix, and its documents."""
    prefix = tmp_path_factory.mktemp("data") / "train"
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCAB, length) for length in LENGTHS]
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.concatenate(documents), LENGTHS)
    return prefix, documents


def pieces(documents):
    """Tokens and labels of every document, cut where a row ends."""
    begin = 0
    for document in documents:
        cuts = [0, *(cut - begin for cut in range(0, begin + len(document), ROW) if cut > begin), len(document)]
        labels = np.append(document[1:], IGNORE)
        for first, last in pairwise(cuts):
            yield document[first:last], labels[first:last]
        begin += len(document)


def summed(model, tokens, labels, segments=None) -> tuple[torch.Tensor, int]:
    """The loss of a batch, and its number of targets."""
    depth = model.architecture.mtp_depth
    labels = mtp_labels(labels, segments, depth) if depth else labels
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    losses = model(tokens, positions, segments, labels=labels)
    total, targets, _ = token_loss(losses, labels, 0.3)
    return total, int(targets)


def gradients(model, batches) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Loss, number of targets and gradients over all batches."""
    model.zero_grad()
    loss, count = 0.0, 0
    for batch in batches:
        total, targets = summed(model, *batch)
        total.backward()
        loss, count = loss + float(total.detach()), count + targets
    return loss, count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_equal_one_document_at_a_time(documents, name):
    prefix, stored = documents
    initialize(ParallelConfig(), 1)
    model = build(ARCHITECTURES[name], ParallelConfig(), dtype=torch.float64, perform_initialization=True)[0].eval()
    data = IndexedSequences(prefix, ROW, seed=None, document_mask=True)
    rows = data.batch(np.arange(len(data)))
    together = gradients(model, [(rows.tokens, rows.labels, rows.segments)])
    alone = gradients(model, [[torch.from_numpy(part)[None].long() for part in piece] for piece in pieces(stored)])
    assert together[1] == alone[1] == sum(LENGTHS) - len(LENGTHS)
    # The loss of a token is fp32, of size 4; over 207 tokens.
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together[2].keys() == alone[2].keys()
    for parameter, gradient in alone[2].items():
        largest = gradient.abs().max()
        assert (together[2][parameter] - gradient).abs().max() <= 1e-6 * largest, parameter
