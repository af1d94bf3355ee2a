"""States of ranks by arithmetic. `test_rehearse.py` compares them with what ranks hold, to the byte."""

from dataclasses import replace

import pytest

from shared.families import registry
from shared.mapping.adapters import LoraSettings
from shared.parallel import ParallelConfig
from shared.training.plan import adapter_parameters
from shared.training.states import fullest, of_stages

FOUR = ParallelConfig(processes=4, pipeline=4)


@pytest.mark.parametrize("size", ["llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b"])
def test_bytes_of_one_rank_are_those_of_its_parameters(make_config, size) -> None:
    """2 of weights, 4 of gradients, 12 of main weights and moments (arXiv:1910.02054, section 3.1, but fp32 gradients). In fp32
    weights are their own main copy. Only buffers are padded, by less than 128 numbers."""
    model = registry.sizes()[size]
    rows = model.padded_vocab_size(1) - model.vocab_size
    parameters = model.parameter_count() + rows * model.hidden_size * (1 if model.head.tied else 2)
    (held,) = of_stages(make_config(precision="bf16"), model)
    assert (held.weights, held.optimizer) == (2 * parameters, 12 * parameters)
    assert 4 * parameters <= held.gradients < 4 * (parameters + 128)
    (wide,) = of_stages(make_config(precision="fp32"), model)
    assert (wide.weights, wide.optimizer) == (4 * parameters, 8 * parameters)


def test_the_optimizer_is_shared_by_data_and_context_parallel_ranks(make_config, architecture) -> None:
    (alone,) = of_stages(make_config(), architecture)
    parallel = ParallelConfig(processes=8, context=2)
    (shared,) = of_stages(make_config(global_batch_size=8, parallel=parallel), architecture)
    assert shared.weights == alone.weights
    assert alone.optimizer / 8 <= shared.optimizer < alone.optimizer / 8 + 12 * 128


def test_experts_are_spread_over_their_own_ranks(make_config) -> None:
    """8 of 128 experts on each of 16 ranks, all else on every rank."""
    model = registry.sizes()["qwen3-30b-a3b"]
    moe = model.moe
    experts = model.num_layers * moe.experts * moe.expert.parameter_count(model.hidden_size)
    parallel = ParallelConfig(processes=16, expert=16)
    (held,) = of_stages(make_config(global_batch_size=32, parallel=parallel), model)
    (whole,) = of_stages(make_config(), model)
    width = whole.weights // (model.parameter_count() + _padding(model))
    assert held.weights == whole.weights - width * (experts - experts // 16)


def _padding(model) -> int:
    return (model.padded_vocab_size(1) - model.vocab_size) * model.hidden_size * (1 if model.head.tied else 2)


def test_adapters_are_all_that_is_trained(make_config, architecture) -> None:
    lora = LoraSettings(rank=8, alpha=16)
    trained = adapter_parameters(lora, architecture)
    (held,), (whole,) = (of_stages(make_config(precision="bf16", lora=each), architecture) for each in (lora, None))
    assert (held.optimizer, held.trained_weights) == (12 * trained, 2 * trained)
    assert held.weights == whole.weights + held.trained_weights


def test_the_fullest_stage_is_the_one_with_most_layers(make_config, architecture) -> None:
    model = replace(architecture, layers=architecture.layers[:1] * 8)

    def held(*layers: int) -> list[int]:
        config = make_config(parallel=replace(FOUR, pipeline_layers=layers or None))
        stages = of_stages(config, model)
        assert fullest(config, model) == max(stages, key=lambda each: each.total)
        return [each.weights for each in stages]

    even, uneven = held(), held(1, 3, 3, 1)
    assert held(2, 2, 2, 2) == even
    layer = even[0] - uneven[0]
    assert [after - before for before, after in zip(even, uneven, strict=True)] == [-layer, layer, layer, -layer]


def test_chunks_of_an_interleaved_pipeline_are_dealt_to_stages_in_turn(make_config, architecture) -> None:
    model = replace(architecture, layers=architecture.layers[:1] * 8)

    def weights(*layers: int) -> list[int]:
        parallel = ParallelConfig(processes=2, pipeline=2, virtual_pipeline=2, pipeline_layers=layers)
        return [each.weights for each in of_stages(make_config(parallel=parallel), model)]

    assert weights(1, 3, 2, 2) == weights(2, 2, 1, 3) == weights(2, 3, 1, 2)
    even, uneven = weights(2, 2, 2, 2), weights(1, 3, 2, 2)
    assert even[0] - uneven[0] == uneven[1] - even[1] > 0
