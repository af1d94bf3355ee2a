"""The loss is the mean over the global batch's target tokens: invariant to micro-batching, DP size and packing."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import shared.runtime.device
from shared.data.labels import IGNORE
from shared.families import registry
from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.data import Batch
from shared.training.loop import forward_backward, model_overrides, trainable_of, validate
from shared.training.loss import Loss, mtp_labels, token_loss
from shared.training.optimizer import build_optimizer, set_learning_rate, wrap

# fp32 sums in another order differ by a few units in the last place, 6e-8 of the value each.
ROUNDING = 2e-6


class Rows:
    """A dataset of given rows."""

    sequence_length = 24

    def __init__(self, rows: list[Batch], padding: bool = False) -> None:
        self.rows = rows
        self.padding = padding  # whether segment 0 is declared to be padding

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: np.ndarray) -> Batch:
        picked = [self.rows[int(position) % len(self.rows)] for position in positions]
        return Batch(
            tokens=torch.stack([row.tokens for row in picked]),
            labels=torch.stack([row.labels for row in picked]),
            segments=torch.stack([row.segments for row in picked]),
            padding=torch.stack([row.segments == 0 for row in picked]) if self.padding else None,
        )


def conversations() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of four conversations of uneven length, and unevenly many targets."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, targets in ((12, 3), (12, 11), (7, 1), (17, 8)):
        tokens = torch.randint(0, 300, (length,), generator=generator)
        labels = tokens.roll(-1)
        labels[: length - targets - 1] = IGNORE
        labels[-1] = IGNORE
        made.append((tokens, labels))
    return made


def row(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    """Conversations one after another in a row of 24, then padding."""
    tokens, labels, segments = torch.zeros(24).long(), torch.full((24,), IGNORE), torch.zeros(24).long()
    place = 0
    for number, (part, targets) in enumerate(parts, start=1):
        end = place + len(part)
        tokens[place:end], labels[place:end], segments[place:end] = part, targets, number
        place = end
    return Batch(tokens=tokens, labels=labels, segments=segments)


@pytest.fixture
def trained(make_config, tiny_run, start):
    """A function from rows and sizes to: validation loss, losses of three updates, and a weight after them."""

    def train(rows: list[Batch], micro_batch_size: int, **changes) -> tuple[float, list[float], torch.Tensor]:
        before, losses, chunk = updates(make_config, tiny_run[1], start, rows, micro_batch_size, **changes)
        weight = chunk.decoder.layers[0].mlp.linear_fc1.weight.detach().clone()
        return before.mean, [loss.mean for loss in losses], weight

    return train


@pytest.fixture
def trained_mtp(make_config, mtp_run, start_mtp):
    """The same of a model with MTP layers: MTP losses, and the model."""

    def train(rows: list[Batch], micro_batch_size: int, **changes) -> tuple[float, list[float], gpt.LanguageModel]:
        before, losses, chunk = updates(make_config, mtp_run[1], start_mtp, rows, micro_batch_size, **changes)
        return before.mtp, [loss.mtp for loss in losses], chunk

    return train


def updates(
    make_config, architecture, start, rows: list[Batch], micro_batch_size: int, **changes
) -> tuple[Loss, list[Loss], gpt.LanguageModel]:
    """Validation, three updates, and the model after them."""
    config = make_config(
        sequence_length=24,
        micro_batch_size=micro_batch_size,
        global_batch_size=len(rows),
        learning_rate=1e-2,
        **changes,
    )
    device = shared.runtime.device.select_device()
    layout = ParallelConfig()
    process_groups.initialize(layout, 1)
    chunks = gpt.build(architecture, layout, dtype=torch.float32, **model_overrides(config))
    weights.load(chunks, start)
    trainable_of(config, architecture).apply(chunks)
    model = wrap(chunks, overlap=True)
    optimizer = build_optimizer(config, model)
    data = Rows(rows)
    before = validate(config, model, data, device)
    losses = []
    for step in range(3):
        loss = forward_backward(config, model, data, step * config.global_batch_size, device)
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        losses.append(loss)
    return before, losses, chunks[0]


def test_micro_batches_and_packing_change_nothing(trained):
    one, two, three, four = conversations()
    apart = [row([part]) for part in (one, two, three, four)]
    reference = trained(apart, 4)
    for name, rows, size in (
        ("micro batches of one", apart, 1),
        ("packed in two rows", [row([one, two]), row([four, three])], 1),
        ("packed the other way", [row([three, four]), row([two, one])], 2),
    ):
        before, losses, weight = trained(rows, size)
        assert before == pytest.approx(reference[0], rel=ROUNDING), name
        assert losses == pytest.approx(reference[1], rel=ROUNDING), name
        # Adam divides by the root of the gradient's square: where that is near zero, rounding is magnified.
        assert torch.allclose(weight, reference[2], atol=2e-4), name
    assert reference[1][2] < reference[1][0]


def test_neighbours_in_a_row_are_invisible(trained):
    """The first conversation's loss with another one behind and before it, and alone."""
    one, two, _, _ = conversations()
    silent = (two[0], torch.full_like(two[1], IGNORE))
    alone = trained([row([one])], 1)[0]
    assert trained([row([silent, one])], 1)[0] == pytest.approx(alone, rel=ROUNDING)
    assert trained([row([one, silent])], 1)[0] == pytest.approx(alone, rel=ROUNDING)


def test_mtp_loss_does_not_depend_on_micro_batches_and_packing(trained_mtp):
    one, two, three, four = conversations()
    apart = [row([part]) for part in (one, two, three, four)]
    before, losses, chunk = trained_mtp(apart, 4)
    assert losses[2] < losses[0]
    weights = {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
    for rows, size in (
        (apart, 1),
        ([row([one, two]), row([four, three])], 1),
        ([row([three, four]), row([two, one])], 2),
    ):
        found = trained_mtp(rows, size)
        assert found[0] == pytest.approx(before, rel=ROUNDING)
        assert found[1] == pytest.approx(losses, rel=ROUNDING)
        for name, weight in found[2].named_parameters():
            assert torch.allclose(weight, weights[name], atol=2e-4), name  # as above


def test_mtp_targets_are_of_the_same_conversation(trained_mtp):
    """The first conversation's loss with another one behind and before it, and alone."""
    one, two, _, _ = conversations()
    silent = (two[0], torch.full_like(two[1], IGNORE))
    alone = trained_mtp([row([one])], 1)[0]
    assert trained_mtp([row([silent, one])], 1)[0] == pytest.approx(alone, rel=ROUNDING)
    assert trained_mtp([row([one, silent])], 1)[0] == pytest.approx(alone, rel=ROUNDING)


def test_mtp_labels():
    labels = torch.tensor([[11, 12, IGNORE, 14, 15, IGNORE]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    none = IGNORE
    assert mtp_labels(labels, None, 2).tolist() == [
        labels.tolist(),
        [[12, none, 14, 15, none, none]],
        [[none, 14, 15, none, none, none]],
    ]
    # A label's segment is that of the token that predicts it.
    assert mtp_labels(labels, segments, 2).tolist() == [
        labels.tolist(),
        [[12, none, none, 15, none, none]],
        [[none, none, none, none, none, none]],
    ]


def test_without_a_loss_mtp_layers_stay(trained_mtp, mtp_run, start_mtp):
    rows = [row([part]) for part in conversations()]
    first = trained_mtp(rows, 4, mtp_loss_scaling_factor=0.0)
    assert first[:2] == (None, [None] * 3)
    second = trained_mtp(rows, 4)
    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(mtp_run[1], ParallelConfig(), dtype=torch.float32)
    weights.load(chunks, start_mtp)
    for name, weight in chunks[0].named_parameters():
        kept, trained = (made[2].get_parameter(name) for made in (first, second))
        assert torch.equal(kept, weight) == name.startswith("mtp."), name
        assert not torch.equal(trained, weight), name


def test_the_sum_and_the_count():
    labels = torch.tensor([[1, IGNORE], [2, 3]])
    losses = torch.tensor([[1.5, 0.0], [2.0, 0.25]])
    total, count, report = token_loss(losses, labels)
    assert (float(total), int(count)) == (3.75, 3)
    assert report["loss"].tolist() == [3.75, 3.0, 0.0, 0.0]


def test_the_mtp_sum_is_divided_by_next_token_targets():
    """DeepSeek V3's: the mean over layers of sums, which are divided by the number of next tokens as all gradients are."""
    labels = torch.tensor([[[1, 2, 3]], [[2, 3, IGNORE]], [[3, IGNORE, IGNORE]]])
    losses = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 0.0]], [[6.0, 0.0, 0.0]]])
    total, count, report = token_loss(losses, labels, 0.1)
    assert (float(total), int(count)) == (pytest.approx(6.0 + 0.1 * (9.0 + 6.0) / 2), 3)
    assert report["loss"].tolist() == [6.0, 3.0, 15.0, 3.0]


def test_validation_counts_every_sequence_once(trained):
    """Three of four rows in micro batches of two: what fills up the last one adds nothing."""
    parts = conversations()
    each = [trained([row([part])], 1)[0] for part in parts[:3]]
    counts = [int((labels != IGNORE).sum()) for _, labels in parts[:3]]
    mean = sum(loss * count for loss, count in zip(each, counts, strict=True)) / sum(counts)
    found, _, _ = trained([row([part]) for part in parts], 2, validation_sequences=3)
    assert found == pytest.approx(mean, rel=ROUNDING)


def balancing_gradient(
    weight: torch.Tensor, rows: torch.Tensor, padding: torch.Tensor | None, top_k: int, over: str
) -> torch.Tensor:
    """Gradient of the balancing loss of one micro batch with coefficient 1, in float64.

    Args:
        weight: of the router, `[experts, hidden]`.
        rows: its inputs, `[sequence, batch, hidden]`.
        padding: `[sequence, batch]`: tokens that do not count.
        top_k: experts of a token.
        over: tokens over which the load is balanced: "batch" or "sequence", the mean over rows.
    """
    weight = weight.detach().double().requires_grad_()
    kept = torch.ones(rows.shape[:2], dtype=torch.bool) if padding is None else ~padding
    parts = [row[keep] for row, keep in zip(rows.unbind(1), kept.unbind(1), strict=True)]
    parts = [torch.cat(parts)] if over == "batch" else parts
    losses = []
    for part in parts:
        probabilities = torch.softmax(part.double() @ weight.T, dim=-1)
        chosen = functional.one_hot(probabilities.topk(top_k).indices, len(weight)).sum((0, 1)).double()
        losses.append(len(weight) * (chosen / (len(part) * top_k) * probabilities.mean(0)).sum())
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
    return gradient


@pytest.mark.parametrize("over", ["batch", "sequence"])
@pytest.mark.parametrize(("micro_batch_size", "padding"), [(1, False), (1, True), (2, True), (4, False), (4, True)])
def test_the_balancing_loss_of_experts_does_not_depend_on_the_number_of_targets(
    make_config, make_weights, tmp_path, over, micro_batch_size, padding
):
    """Gradient of a router with the balancing loss, less that without, where 23 of 96 tokens are targets, 48 padding."""
    rows = [row([part]) for part in conversations()]
    config = make_config(sequence_length=24, micro_batch_size=micro_batch_size, global_batch_size=len(rows))
    size = registry.sizes()["qwen3-moe-tiny"].with_values(num_layers=1)
    start = make_weights(tmp_path / "release", size)
    found, inputs = {}, []
    for coefficient in (0.0, 2.0):
        architecture = size.with_values(moe={"auxiliary_loss": coefficient, "auxiliary_loss_over": over})
        process_groups.initialize(ParallelConfig(), 1)
        chunks = gpt.build(architecture, ParallelConfig(), dtype=torch.float32, **model_overrides(config))
        weights.load(chunks, start)
        model = wrap(chunks, overlap=True)
        router = chunks[0].decoder.layers[0].mlp.router
        inputs.clear()
        router.register_forward_hook(lambda module, given, made: inputs.append((given[0].detach(), given[1])))
        forward_backward(config, model, Rows(rows, padding), 0, shared.runtime.device.select_device())
        found[coefficient] = router.weight.main_grad.double().clone()
    assert all((hidden is not None) == padding for _, hidden in inputs)
    each = [balancing_gradient(router.weight, x, hidden, size.moe.top_k, over) for x, hidden in inputs]
    wanted = 2.0 * torch.stack(each).mean(0)
    # Differences of two fp32 gradients, that of the loss being the larger part of one.
    assert (found[2.0] - found[0.0] - wanted).abs().max() < 1e-5 * found[2.0].abs().max()
    assert wanted.abs().max() > 0.01 * found[0.0].abs().max()
