"""AdamW, as configured and after a resume, against torch's AdamW on the unsharded model."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.kernels.grouped import stacked
from shared.model import gpt, weights
from shared.model.experts import GroupedExperts
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training import state
from shared.training.data import Batch
from shared.training.loop import forward_backward, model_overrides
from shared.training.optimizer import build_optimizer, set_learning_rate, wrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Words:
    """Samples that repeat a few words: learnable."""

    sequence_length = 24

    def __len__(self) -> int:
        return 64

    def batch(self, positions) -> Batch:
        rows = [(torch.arange(25) * (1 + int(position) % 3)) % 11 for position in positions]
        samples = torch.stack(rows)
        return Batch(tokens=samples[:, :-1].clone(), labels=samples[:, 1:].clone())


@pytest.fixture
def made(make_config, architecture, start):
    """A function to a fresh model and optimizer, from `start` or a saved directory, and a function that trains them."""

    def make(directory=None, precision="fp32", **changes):
        config = make_config(sequence_length=24, precision=precision, **changes)
        layout = ParallelConfig()
        device = process_groups.initialize(layout, 1)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        chunks = gpt.build(architecture, layout, dtype=dtype, **model_overrides(config))
        weights.load(chunks, directory or start)
        model = wrap(chunks, overlap=True)
        optimizer = build_optimizer(config, model)

        def train(first: int, last: int, rate: float = 1e-2) -> list[tuple[float, float]]:
            rows = []
            for step in range(first, last):
                loss = forward_backward(config, model, Words(), step * config.global_batch_size, device).mean
                set_learning_rate(optimizer, rate)
                _, norm, _ = optimizer.step()
                rows.append((loss, float(norm)))
            return rows

        return model, optimizer, train

    return make


def test_weight_decay_is_on_matrices_only(made):
    model, optimizer, _ = made(weight_decay=0.25)
    decays = {}
    inner = optimizer.chained_optimizers[0]
    for parameter, (group, _) in inner.model_param_group_index_map.items():
        decays.setdefault(parameter.dim(), set()).add(inner.optimizer.param_groups[group]["weight_decay"])
    assert decays == {1: {0.0}, 2: {0.25}}
    assert sum(1 for _ in model[0].parameters()) == len(inner.model_param_group_index_map)


def test_updates_are_those_of_torch_adamw(made):
    """Three updates against torch.optim.AdamW and torch's own gradient clipping on the same gradients."""
    model, _, train = made(weight_decay=0.1, clip_grad=0.5)
    reference, _, _ = made()
    names = [name for name, _ in reference[0].named_parameters()]
    ours = dict(model[0].named_parameters())
    theirs = {
        name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in reference[0].named_parameters()
    }
    groups = [
        {"params": [theirs[name] for name in names if theirs[name].dim() > 1], "weight_decay": 0.1},
        {"params": [theirs[name] for name in names if theirs[name].dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        ((_, norm),) = train(step, step + 1)
        # main_grad holds the mean over targets, clipped in place by the optimizer.
        for name in names:
            theirs[name].grad = ours[name].main_grad.clone()
        clipped = torch.nn.utils.clip_grad_norm_(theirs.values(), math.inf)
        assert float(clipped) == pytest.approx(min(norm, 0.5), rel=1e-4)
        adamw.step()
    for name in names:
        # One ulp of fp32 weights near one, three times.
        assert torch.allclose(ours[name], theirs[name], atol=1e-6), name


def test_learning_rate_zero_leaves_every_bit(made):
    for precision in ("fp32", "bf16"):
        model, _, train = made(precision=precision, weight_decay=0.1)
        before = [parameter.detach().clone() for parameter in model[0].parameters()]
        train(0, 2, rate=0.0)
        assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_run_goes_on_bit_for_bit(made, tmp_path, precision):
    model, optimizer, train = made(precision=precision)
    begun = train(0, 3)
    state.save(tmp_path, model, optimizer, step=3)
    expected = train(3, 7)
    assert expected[-1][0] < begun[0][0] - 1.0  # it learns, so that a wrong state would show
    restored, other, resume = made(tmp_path, precision=precision)
    torch.manual_seed(77)
    assert state.load(tmp_path, restored, other) == 3
    assert resume(3, 7) == expected
    assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), restored[0].parameters(), strict=True))


def test_a_restored_run_counts_its_steps_once(made, tmp_path):
    """Megatron-Core restores one step tensor for all parameters; AdamW would add one to it per parameter."""
    model, optimizer, train = made()
    train(0, 3)
    state.save(tmp_path, model, optimizer, step=3)
    restored, other, resume = made(tmp_path)
    state.load(tmp_path, restored, other)
    resume(3, 5)
    states = other.chained_optimizers[0].optimizer.state.values()
    assert {float(entry["step"]) for entry in states} == {5.0}
    assert len({entry["step"].data_ptr() for entry in states}) == len(states) > 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_experts_are_not_copied_for_their_product(make_config, make_weights, tmp_path, precision):
    """In the buffer of parameters they are evenly spaced, from the last to the first."""
    architecture = registry.sizes()["qwen3-moe-tiny"]
    config = make_config(sequence_length=24, precision=precision)
    start = make_weights(tmp_path / "release", architecture)
    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(architecture, ParallelConfig(), dtype=DTYPES[precision], **model_overrides(config))
    weights.load(chunks, start)
    build_optimizer(config, wrap(chunks, overlap=True))
    found = [each for each in chunks[0].modules() if isinstance(each, GroupedExperts)]
    assert len(found) == architecture.num_layers
    for experts in found:
        for linear in ("linear_fc1", "linear_fc2"):
            parts = experts._each(linear, "weight")
            assert stacked(parts).data_ptr() == parts[0].data_ptr()
            assert torch.equal(stacked(parts), torch.stack(parts))


def test_random_numbers_go_on(made, tmp_path):
    model, optimizer, train = made()
    train(0, 1)  # makes the optimizer's state
    torch.manual_seed(9)
    torch.rand(5)
    state.save(tmp_path, model, optimizer, step=1)
    expected = torch.rand(3)
    restored, other, _ = made(tmp_path)
    state.load(tmp_path, restored, other)
    assert torch.equal(torch.rand(3), expected)


# Layouts in which experts have data-parallel groups of their own. Size, layout, processes.
EXPERTS = {
    "etp_1": ("qwen3-moe-tiny", {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1}, 2),
    "stage_without_experts": ("deepseek-v2-tiny", {"pipeline": 2, "expert": 2}, 4),  # its first layer is dense
}


def expert_architecture(name: str) -> Architecture:
    """With a balancing loss as heavy as the loss, over micro batches or sequences: its part of the gradient norm shows."""
    over = {"etp_1": "sequence", "stage_without_experts": "batch"}[name]
    return registry.sizes()[EXPERTS[name][0]].with_values(moe={"auxiliary_loss": 1.0, "auxiliary_loss_over": over})


@pytest.fixture(scope="module")
def expert_runs(run_cases, sessions, make_weights, tiny_run, tmp_path_factory):
    """The directory and the results of EXPERTS, and updates 1-3 and 4-5 of the same models in one process."""
    start, config = tmp_path_factory.mktemp("experts"), replace(tiny_run[0], micro_batch_size=2)
    one_process, cases = {}, {}
    for name, (size, layout, processes) in EXPERTS.items():
        architecture = expert_architecture(name)
        session = sessions.Session(config, architecture, make_weights(start / size, architecture), restore=False)
        first = session.train(0, 3)
        balance = session.balances[0]
        session.save(start / f"{size}.3", step=3)
        one_process[name] = {"first": first, "balance": balance, "continued": session.train(3, 5)}
        cases[name] = {
            "processes": processes,
            "updates": 5,
            "config": asdict(config),
            "architecture": architecture.to_dict(),
            "layout": layout,
            "frozen": None,
            "start": str(start / size),
            "one_process": str(start / f"{size}.3"),
        }
    return *run_cases(cases), one_process


@pytest.mark.parametrize("name", EXPERTS)
def test_two_optimizers_train_save_and_resume_as_one(expert_runs, name):
    results, one_process = expert_runs[1][name], expert_runs[2][name]
    assert all(len(rank["parameters"]) == 2 for rank in results["ranks"])
    assert all(rank["fused"] and rank["weight_decays"] == [0.0, 0.1] for rank in results["ranks"])
    assert results["resumed"] == results["continued"]
    assert all(steps in ([5.0], []) for rank in results["ranks"] for steps in rank["steps"])
    # fp32 sums in another order. Later updates are not compared: near-equal scores send a token to another expert.
    assert results["first"][0] == pytest.approx(one_process["first"][0], rel=1e-5)
    assert results["resumed_from_one_process"][0] == pytest.approx(one_process["continued"][0], rel=1e-5)
    assert set(results["balance"]) >= {"moe_expert_load", "moe_highest_expert_load"}
    assert results["balance"] == pytest.approx(one_process["balance"], rel=1e-6)


def test_a_pipeline_stage_without_experts_has_an_optimizer_without_parameters(expert_runs):
    counts = [rank["parameters"] for rank in expert_runs[1]["stage_without_experts"]["ranks"]]
    assert [experts > 0 for _, experts in counts] == [False, False, True, True]
    assert all(dense > 0 for dense, _ in counts)


@pytest.mark.parametrize("name", EXPERTS)
def test_one_optimizer_resumes_what_two_saved(expert_runs, sessions, tiny_run, name):
    directory, results, _ = expert_runs
    architecture = expert_architecture(name)
    config = replace(tiny_run[0], micro_batch_size=2)
    (loss, *_), *_ = sessions.Session(config, architecture, directory / name / "3").train(3, 4)
    assert loss == pytest.approx(results[name]["continued"][0][0], rel=1e-5)


# Modules that read the weights of others are in the first.
OVERLAPPING = {
    "data": ("qwen3-next-tiny", {}, 2),
    "experts": ("qwen3-moe-tiny", {"expert": 2}, 2),
    "data_and_virtual_pipeline": ("tiny", {"pipeline": 2, "virtual_pipeline": 2}, 4),
}


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory, run_cases, make_weights, tiny_run):
    """Results of `overlap_worker.py`."""
    start, (config, tiny) = tmp_path_factory.mktemp("overlap"), tiny_run
    cases = {}
    for name, (size, layout, processes) in OVERLAPPING.items():
        architecture = tiny if size == "tiny" else registry.sizes()[size]
        if not (start / size).exists():
            make_weights(start / size, architecture)
        cases[name] = {
            "processes": processes,
            "config": asdict(config),
            "architecture": architecture.to_dict(),
            "layout": layout,
            "start": str(start / size),
        }
    return run_cases(cases, worker="overlap_worker.py")[1]


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlap_makes_the_same_updates(overlapping, name):
    plain, overlap = (overlapping[name][way] for way in ("plain", "overlap"))
    assert plain["buckets"] <= 2  # a tied embedding has one of its own in a pipeline
    assert overlap["buckets"] > 3
    assert overlap["rows"][0][:2] == plain["rows"][0][:2]
    # Buckets cut the parameters elsewhere over the ranks: the norm is another sum, and fused AdamW rounds the end of a shard as
    # a scalar and the rest as a vector.
    assert overlap["validation"] == pytest.approx(plain["validation"], rel=1e-6)
    for one, other in zip(overlap["rows"], plain["rows"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_a_checkpoint_has_the_weights_after_the_update_though_ranks_have_old_ones(overlapping, name):
    plain, overlap = (overlapping[name][way] for way in ("plain", "overlap"))
    assert (plain["old_weights"], overlap["old_weights"] > 0) == (0, True)
    for way in (plain, overlap):
        assert way["resumed"] == way["rows"][1:]
