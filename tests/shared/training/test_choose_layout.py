"""A search for a layout: states by arithmetic against the bytes that rehearsals of the same ranks hold, and their work."""

from pathlib import Path

import pytest

from tests.workers import results_under_stubs

WORKSPACES = 64 * 2**20  # cuBLAS's of a Hopper


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> dict:
    """By case and stage: bytes by arithmetic, and the rank as it was played."""
    return results_under_stubs(Path(__file__).with_name("planner_worker.py"), tmp_path_factory.mktemp("planned"))


def test_arithmetic_gives_the_bytes_that_a_rehearsal_holds(compared) -> None:
    """Weights to the byte. Gradient buffers but for what pads buckets, and main weights and moments but for a share of that and
    the count of steps, 4 bytes a tensor."""
    assert len(compared) == 9
    for case, stages in compared.items():
        for stage, (said, played) in stages.items():
            assert not isinstance(played, Exception), f"{case}: {played} {getattr(played, 'trace', '')}"
            weights, gradients, optimizer = played.held.values()
            assert weights == said.weights, f"{case}, stage {stage}"
            assert abs(gradients - said.gradients) <= 4 * 2048, f"{case}, stage {stage}"
            assert abs(optimizer - said.optimizer) <= 12 * 2048, f"{case}, stage {stage}"


def test_a_rehearsal_says_no_less_than_arithmetic(compared) -> None:
    """What is allocated between updates: these, cuBLAS's workspaces, and blocks that are a little larger."""
    for stages in compared.values():
        for said, played in stages.values():
            assert said.total - 12 * 2048 < played.states < said.total + WORKSPACES + 3 * 2**20


def test_work_is_counted_by_phase(compared) -> None:
    """Of the last update: 6 FLOPs a weight and token (arXiv:2001.08361), and attention, causal in full. Embeddings have none."""
    from tests.layouts.cases import MODELS

    played = compared["DP 4"][0][1]
    assert all(phase.endswith("of update 2") for phase in played.work)
    counted = played.work["forward and backward of update 2"]
    model = MODELS["GQA"]
    padded = model.padded_vocab_size(1) - model.vocab_size
    weights = model.parameter_count() - model.vocab_size * model.hidden_size + padded * model.hidden_size
    norms = sum(1 for _ in range(2 * model.num_layers + 1)) * model.hidden_size + 2 * model.num_layers * 16
    tokens = 2 * 32  # micro batches of one row
    attention = 2 * 4 * 8 * 16 * 32 * tokens * model.num_layers
    least, most = 6 * (weights - norms) * tokens + attention, 6 * (weights - norms) * tokens + 4 * attention
    assert least <= counted.flops <= most
    assert counted.operations > 200
    assert counted.seconds >= 3e-6 * counted.operations * (1 - 1e-9)  # a sum of floats
    assert played.work["optimizer of update 2"].flops == 0
