"""Our gated delta net against Megatron-Core's module; packed rows against single sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.runtime.device import select_device

select_device()

from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common  # noqa: E402

from shared.families import registry  # noqa: E402
from shared.kernels.gated_delta_rule import l2norm  # noqa: E402


@pytest.fixture
def ours(model_of):
    model = model_of(replace(registry.sizes()["qwen3-next-tiny"], vocab_size=128), torch.float32)
    net = model.decoder.layers[0].self_attention
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


@pytest.fixture
def theirs(ours, monkeypatch):
    """Megatron-Core's own, which asks for Triton kernels though its deterministic mode needs but one of them."""
    monkeypatch.setattr(common, "HAVE_FLA", True)
    monkeypatch.setattr(common, "l2norm", l2norm)
    config = replace(ours.config, deterministic_mode=True)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    kinds = {name: type(getattr(ours, name)) for name in ("in_proj", "out_norm", "out_proj")}
    net = GatedDeltaNet(config, common.GatedDeltaNetSubmodules(**kinds), layer_number=1, pg_collection=groups)
    net.load_state_dict(ours.state_dict())
    return net


def assert_same(ours, theirs):
    # fp32 sums in another order, as in the comparisons of whole models: 1e-4 of the numbers' spread.
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


def test_megatron_core_computes_the_same_of_the_same_weights(ours, theirs):
    hidden = torch.randn(150, 2, 64)
    assert_same(ours(hidden)[0], theirs(hidden, None)[0])


def test_checkpoints_have_megatron_core_s_tensors(ours, theirs):
    def tensors(net):
        found = {}
        for entry in net.sharded_state_dict().values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            found |= {part.key: getattr(part, "global_shape", None) for part in built}
        return found

    assert tensors(ours) == tensors(theirs)
    assert {"in_proj.weight.alpha", "conv1d.weight.query", "A_log", "dt_bias"} <= tensors(ours).keys()


def test_segments_of_a_row_are_computed_as_rows_of_their_own(ours):
    lengths = [1, 2, 3, 70, 64, 10]
    hidden = torch.randn(sum(lengths), 1, 64)
    segments = torch.repeat_interleave(torch.tensor([3, 1, 5, 2, 4, 0]), torch.tensor(lengths))[None]
    packed, _ = ours(hidden, segments)
    alone = torch.cat([ours(part)[0] for part in hidden.split(lengths)])
    assert_same(packed, alone)
    assert (packed - ours(hidden)[0]).abs().max() > 0.1 * packed.std()
