"""Layouts: every one is legal, the balanced shares are all layers, flags are those of the command."""

from dataclasses import replace

import pytest

from shared.parallel import ParallelConfig
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.machine import GPUS
from shared.rehearsal.speed import SPEEDS
from shared.training.layout_candidates import Candidate, Sizes, candidates, guess, guessed_bytes, least_states, shares
from tests.rehearsals.cases import FAMILY_GPUS, architecture_of, largest_of_each_family


@pytest.fixture
def base(make_config):
    return make_config(sequence_length=4096, micro_batch_size=1, global_batch_size=1024, precision="bf16")


def test_every_family_has_legal_layouts_whose_states_fit_1024_gpus(base) -> None:
    """At the largest published size, by a lower bound of the states. `make rehearsals` plays one of each."""
    found = largest_of_each_family()
    assert len(found) >= 43
    for family, model in found.items():
        architecture = architecture_of(model)
        length = min(4096, architecture.max_position_embeddings)
        sizes = Sizes.of(architecture, length)
        every = candidates(replace(base, sequence_length=length), architecture, FAMILY_GPUS)
        usable = GPUS["h100-80"].usable
        found_one = next((each for each in every if least_states(sizes, each.config) < usable), None)
        assert found_one, family
        found_one.config.check_model(architecture)


@pytest.mark.parametrize(
    ("model", "pipeline", "layers"),
    [
        ("Llama-3.1-405B", 16, (7, *(8,) * 14, 7)),
        ("DeepSeek-V3", 16, (*(4,) * 15, 1)),  # the output layer and MTP are as much as three layers
        ("Qwen3-235B-A22B", 8, (*(12,) * 7, 10)),
    ],
)
def test_stages_have_as_much_to_compute(model, pipeline, layers) -> None:
    architecture = architecture_of(model)
    assert shares(architecture, pipeline, 1)[-1] == layers
    assert sum(layers) == architecture.num_layers


def test_moe_is_spread_in_every_way(base) -> None:
    """DeepSeek-V3: EP to 256, ETP 1, uneven stages, VPP, all recomputations and micro batches."""
    every = list(candidates(base, architecture_of("DeepSeek-V3"), 1024))
    assert {each.parallel.expert for each in every} >= {1, 8, 64, 256}
    assert any(each.parallel.etp == 1 and each.parallel.tensor == 4 for each in every)
    assert any(each.parallel.etp == 4 and each.parallel.tensor == 4 for each in every)
    assert {each.recompute for each in every} == {"none", "selective", "full"}
    assert {each.config.micro_batch_size for each in every} == {1, 2, 4, 8}
    assert {each.parallel.virtual_pipeline for each in every} == {1, 2, 4}
    assert all(each.parallel.pipeline_layers for each in every if each.parallel.pipeline > 1)  # 61 is a prime
    assert all(each.parallel.sequence_parallel == (each.parallel.tensor > 1) for each in every)
    assert len({(each.parallel, each.config.micro_batch_size, each.recompute) for each in every}) == len(every)


def test_flags_are_those_of_the_command(base) -> None:
    parallel = ParallelConfig(
        processes=16, tensor=2, pipeline=2, pipeline_layers=(3, 1), sequence_parallel=True, expert=4, expert_tensor=1
    )
    candidate = Candidate(config=replace(base, parallel=parallel, recompute=("full",)))
    assert candidate.flags == {
        "--tensor-parallel": "2",
        "--sequence-parallel": "",
        "--pipeline-parallel": "2",
        "--pipeline-layers": "3,1",
        "--expert-parallel": "4",
        "--expert-tensor-parallel": "1",
        "--recompute": "full",
        "--micro-batch-size": "1",
    }
    assert candidate.short() == "TP2 PP2 EP4 ETP1 DP4"
    plain = Candidate(config=replace(base, parallel=ParallelConfig(processes=2)))
    assert plain.flags == {"--micro-batch-size": "1"}


def test_a_guess_prefers_what_costs_less(base) -> None:
    """TP across nodes and recomputation cost time; recomputation saves memory."""
    architecture, h100 = architecture_of("Meta-Llama-3-8B"), SPEEDS["h100-80"]
    sizes = Sizes.of(architecture, 4096)

    def of(nodes: Nodes, recompute: str = "none") -> float:
        parallel = ParallelConfig(processes=16, tensor=8, sequence_parallel=True)
        return guess(sizes, Candidate(config=replace(base, parallel=parallel, recompute=(recompute,))), h100, nodes)

    within, across = Nodes.filled(16, 8), Nodes.filled(16, 4)
    assert of(within) < of(within, "full") < of(across)
    parallel = ParallelConfig(processes=16, tensor=8, sequence_parallel=True)
    full, none = (
        guessed_bytes(sizes, Candidate(config=replace(base, parallel=parallel, recompute=(kind,))))
        for kind in ("full", "none")
    )
    assert least_states(sizes, replace(base, parallel=parallel)) < full < none
