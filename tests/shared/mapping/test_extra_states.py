"""Extra states have the names that Megatron-Core's modules require."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.families import registry
from shared.mapping.extra_states import extra_states
from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize


@pytest.mark.parametrize(
    "size",
    [
        "tiny",
        "qwen3-tiny",
        "qwen2-moe-tiny",
        "qwen3-moe-tiny-mixed",
        "deepseek-v2-tiny",
        "deepseek-v3-tiny",
        "qwen3-next-tiny",
    ],
)
def test_every_object_that_a_model_asks_for_is_named(size: str) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    architecture = replace(registry.sizes()[size], vocab_size=128)
    initialize(ParallelConfig(), seed=0)
    chunks = gpt.build(architecture, ParallelConfig(), dtype=torch.float32)
    state = weights.sharded_state_dict(chunks)["model"]
    asked = {entry.unique_key for entry in state.values() if isinstance(entry, ShardedObject)}
    names = list(extra_states(architecture))
    assert len(names) == len(set(names))
    # The output layer's has no place for what TransformerEngine has no module for.
    assert asked - {"output_layer._extra_state/shard_0_1"} <= set(names)
    assert any("experts.experts" in name for name in asked) == (architecture.moe is not None)
