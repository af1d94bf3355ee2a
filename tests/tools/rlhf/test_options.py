"""The default of `--processes`: one for each GPU, or the most that the batch sizes can be divided among."""

import pytest

from tools.rlhf.options import DPOOptions, GRPOOptions, KTOOptions
from tools.rlhf.ppo_options import PPOOptions


def options(kind, world, **changes):
    rows = (
        {"data": world.pairs}
        if kind in (DPOOptions, KTOOptions)
        else {"prompts": world.prompts, "reward": world.reward("red")}
    )
    return kind(source=world.policy, target=world.root / "none", **rows, **changes)


@pytest.mark.parametrize(
    ("kind", "sizes", "by_gpus"),
    [
        # 32 replies an update, 8 a forward pass: 4 processes at most, and no 3.
        (DPOOptions, {}, {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 6: 4, 8: 4}),
        (KTOOptions, {"micro_batch_size": 32}, {8: 1}),
        (GRPOOptions, {"global_batch_size": 96, "micro_batch_size": 8}, {8: 6, 5: 4, 3: 3}),
        (PPOOptions, {"global_batch_size": 64, "rollout_batch_size": 64, "micro_batch_size": 8}, {8: 8, 7: 4}),
    ],
)
def test_one_for_each_gpu_where_batches_allow_it(world, kind, sizes, by_gpus):
    made = options(kind, world, **sizes)
    assert {gpus: made.processes_on(gpus) for gpus in by_gpus} == by_gpus


def test_a_part_of_an_epoch_is_one_of_its_updates(world):
    """As transformers' Trainer counts: of 240 rows 7 whole updates of 32 and one of 16 are an epoch."""
    given = {1.0: 8, 0.4: 4, 2.5: 20, 0.01: 1}
    assert {epochs: options(DPOOptions, world, epochs=epochs).updates(240) for epochs in given} == given


def test_the_command_starts_so_many(world, rlhf, monkeypatch):
    """Without `--processes`, and outside of a job of torchrun or Slurm."""
    from shared.runtime import launch

    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "visible_gpus", lambda: 8)
    monkeypatch.setattr(launch, "launch", lambda processes: started.append(processes) or 0)
    flags = {"source": world.policy, "data": world.pairs, "target": world.root / "none"}
    assert rlhf("dpo", **flags) == 0
    assert rlhf("dpo", **flags, processes=2) == 0
    monkeypatch.setenv("RANK", "0")
    assert rlhf("dpo", **flags) == 0
    assert started == [4, 2, None]
