"""Load of experts and balancing loss of an update against a count by hand, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import shared.runtime.device
from shared.architecture.architecture import MTP
from shared.families import registry
from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.balance import loss_over_micro_batch, take_balance
from shared.training.data import Batch
from shared.training.loop import forward_backward, model_overrides, validate
from shared.training.optimizer import wrap

LENGTH, EXPERTS = 24, registry.sizes()["qwen3-moe-tiny"].moe.experts


class Padded:
    """Random rows, each with another share of padding."""

    sequence_length = LENGTH

    def __len__(self) -> int:
        return 4

    def batch(self, positions):
        generator = torch.Generator().manual_seed(int(positions[0]))
        tokens = torch.randint(0, 300, (len(positions), LENGTH + 1), generator=generator)
        lengths = torch.tensor([24, 5, 11, 17])[torch.as_tensor(positions) % 4]
        padding = torch.arange(LENGTH) >= lengths[:, None]
        return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:].clone(), segments=(~padding).long(), padding=padding)


def started(make_config, make_weights, tmp_path, over: str, **changes):
    """A model with two MTP layers and every router's inputs `[sequence, batch, hidden]`, filled while it trains."""
    size = registry.sizes()["qwen3-moe-tiny"].with_values(head={"tied": False})
    architecture = size.with_values(moe={"auxiliary_loss": 0.5, "auxiliary_loss_over": over})
    architecture = replace(architecture, mtp=MTP(depth=2, layer=architecture.layers[0]))
    config = make_config(sequence_length=LENGTH, global_batch_size=4, **changes)
    start = make_weights(tmp_path / "release", architecture)
    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(
        architecture, ParallelConfig(), dtype=torch.float32, recompute=config.recompute, **model_overrides(config)
    )
    weights.load(chunks, start)
    model = wrap(chunks, overlap=True)
    found = {name: [] for name, each in chunks[0].named_modules() if name.endswith("router")}

    def seen(name):
        def hook(module, given, made):
            if torch.is_grad_enabled() and module.training:  # with recomputation once, and not in validation
                found[name].append((given[0].detach().double(), given[1]))

        return hook

    for name in found:
        chunks[0].get_submodule(name).register_forward_hook(seen(name))
    return config, model, found


def counted(weight: torch.Tensor, x: torch.Tensor, padding: torch.Tensor, top_k: int, over: str):
    """Tokens of each expert and the balancing loss of one micro batch: `x` `[sequence, batch, hidden]`."""
    x = x.transpose(0, 1)
    rows = [part[~hidden] for part, hidden in zip(x, padding.transpose(0, 1), strict=True)]
    parts = [torch.cat(rows)] if over == "batch" else rows
    tokens, losses = torch.zeros(len(weight)).double(), []
    for part in parts:
        probabilities = torch.softmax(part @ weight.double().T, dim=-1)
        chosen = functional.one_hot(probabilities.topk(top_k).indices, len(weight)).sum((0, 1)).double()
        losses.append(len(weight) * (chosen / (len(part) * top_k) * probabilities.mean(0)).sum())
        tokens += chosen
    return tokens, torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("over", "micro_batch_size", "recompute"),
    [("batch", 4, "none"), ("batch", 2, "full"), ("sequence", 2, "none"), ("sequence", 1, "selective")],
)
def test_the_count_of_an_update(make_config, make_weights, tmp_path, over, micro_batch_size, recompute):
    changes = {"micro_batch_size": micro_batch_size, "recompute": recompute}
    config, model, found = started(make_config, make_weights, tmp_path, over, **changes)
    device = shared.runtime.device.select_device()
    validate(config, model, Padded(), device)
    for first in (0, 4):  # the second update starts from zero
        for inputs in found.values():
            inputs.clear()
        forward_backward(config, model, Padded(), first, device)
        balance = take_balance(config, model, device)
        loads, losses = [], []
        for name, inputs in found.items():
            weight = model[0].module.get_submodule(name).weight.detach()
            each = [counted(weight, x, padding, model[0].module.config.moe_router_topk, over) for x, padding in inputs]
            assert len(each) == 4 // micro_batch_size
            tokens = torch.stack([count for count, _ in each]).sum(0)
            loads.append(float(tokens.max() / tokens.mean()))
            losses.append(float(torch.stack([loss for _, loss in each]).mean()))
        assert len(loads) == model[0].module.architecture.num_layers + 2
        assert balance.load == pytest.approx(sum(loads) / len(loads), rel=1e-12)
        assert balance.highest_load == pytest.approx(max(loads), rel=1e-12)
        assert balance.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)  # fp32 in the router
    name = {"batch": "moe_load_balancing_loss", "sequence": "moe_seq_load_balancing_loss"}[over]
    assert balance.row() == {
        name: balance.loss,
        "moe_expert_load": balance.load,
        "moe_highest_expert_load": balance.highest_load,
    }
    assert str(balance) == f"balance {balance.loss:.4f}  load {balance.load:.2f}"


def test_layers_that_do_not_run_are_left_out(make_config, make_weights, tmp_path):
    config, model, _ = started(make_config, make_weights, tmp_path, "batch", mtp_loss_scaling_factor=0.0)
    device = shared.runtime.device.select_device()
    forward_backward(config, model, Padded(), 0, device)
    balance = take_balance(config, model, device)
    assert 1.0 <= balance.load <= balance.highest_load <= EXPERTS
    assert balance.loss >= 0.9


def test_the_micro_batch_matters_to_a_loss_over_it():
    size = registry.sizes()["qwen3-moe-tiny"]
    assert loss_over_micro_batch(size.with_values(moe={"auxiliary_loss": 0.1, "auxiliary_loss_over": "batch"}))
    assert not loss_over_micro_batch(size.with_values(moe={"auxiliary_loss": 0.1, "auxiliary_loss_over": "sequence"}))
    assert not loss_over_micro_batch(size.with_values(moe={"auxiliary_loss": 0.0}))
    assert not loss_over_micro_batch(registry.sizes()["qwen3-tiny"])
