"""Moments in host memory: the same updates, part by part."""

import pytest
import torch

from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training import host_moments, state
from shared.training.loop import forward_backward, model_overrides
from shared.training.optimizer import build_optimizer, held_bytes, set_learning_rate, wrap
from tests.shared.training.test_optimizer import Words


@pytest.fixture
def made(make_config, architecture, start):
    """A function to a model, its optimizer, and a function that trains them."""

    def make(directory=None, **changes):
        config = make_config(sequence_length=24, **changes)
        device = process_groups.initialize(ParallelConfig(), 1)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        chunks = gpt.build(architecture, ParallelConfig(), dtype=dtype, **model_overrides(config))
        weights.load(chunks, directory or start)
        model = wrap(chunks, overlap=True)
        optimizer = build_optimizer(config, model)
        if directory:
            state.load(directory, model, optimizer)

        def train(first: int, last: int) -> list[tuple[float, float]]:
            rows = []
            for step in range(first, last):
                loss = forward_backward(config, model, Words(), step * config.global_batch_size, device).mean
                set_learning_rate(optimizer, 1e-2)
                _, norm, _ = optimizer.step()
                rows.append((loss, float(norm)))
            return rows

        return model, optimizer, train

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_are_those_without_it_and_a_resume_may_change_it(made, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(host_moments, "PART_BYTES", 8 * 64 * 96)
    model, optimizer, train = made(precision=precision)
    model_off, optimizer_off, train_off = made(precision=precision, offload_optimizer=True)
    for name in "ab":
        (tmp_path / name).mkdir()
    begun = train(0, 3)
    assert train_off(0, 3) == begun
    state.save(tmp_path / "a", model, optimizer, step=3)
    state.save(tmp_path / "b", model_off, optimizer_off, step=3)
    expected = train(3, 6)
    assert expected[-1][0] < begun[0][0] - 1.0  # it learns, so that a wrong moment would show
    assert train_off(3, 6) == expected
    for directory, offloaded in (("a", True), ("b", False), ("b", True)):
        resumed, _, go_on = made(tmp_path / directory, precision=precision, offload_optimizer=offloaded)
        assert go_on(3, 6) == expected, (directory, offloaded)
        assert all(map(torch.equal, resumed[0].parameters(), model[0].parameters()))


def test_parts_have_so_many_bytes(monkeypatch):
    monkeypatch.setattr(host_moments, "PART_BYTES", 800)
    tensors = [torch.zeros(size) for size in (50, 50, 1, 300, 99, 2)]
    assert [[each.numel() for each in part] for part in host_moments._parts(tensors)] == [
        [50, 50],
        [1],
        [300],
        [99],
        [2],
    ]


class CountsCalls(torch.optim.AdamW):
    """Counts updates in the group, as TransformerEngine's FusedAdam does: one more in every call."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_counts_in_its_group_counts_updates(monkeypatch):
    monkeypatch.setattr(host_moments, "PART_BYTES", 8)
    weights_ = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = CountsCalls([{"params": weights_[:2]}, {"params": weights_[2:]}], lr=0.1)
    host_moments.offload(optimizer)
    for _ in range(2):
        for each in weights_:
            each.grad = torch.ones(4)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    assert all(torch.equal(each, weights_[0]) for each in weights_)


def test_an_update_that_fails_leaves_all_groups(monkeypatch):
    weights_ = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [each]} for each in weights_], lr=0.1)

    def fails() -> None:
        raise RuntimeError("no memory")

    optimizer.step = fails
    host_moments.offload(optimizer)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[each] for each in weights_]


@pytest.mark.gpu
def test_moments_are_on_the_host_between_updates(made):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _, _, plain = made(precision="bf16")
    _, optimizer, train = made(precision="bf16", offload_optimizer=True)
    assert train(0, 3) == plain(0, 3)
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    moments = [state[name] for part in parts for state in part.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(each.device.type == "cpu" and each.is_pinned() for each in moments)


@pytest.mark.gpu
def test_held_bytes_tell_them_apart(made):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain, optimizer, train = made(precision="bf16")
    offloaded, other, train_other = made(precision="bf16", offload_optimizer=True)
    train(0, 1)
    train_other(0, 1)
    before, after = held_bytes(plain, optimizer), held_bytes(offloaded, other)
    assert after["optimizer"] + after["moments on the host"] == before["optimizer"]
    assert after["moments on the host"] == 8 * sum(each.numel() for each in offloaded[0].parameters())
