"""Ranks of tiny models, played without a GPU: their memory against arithmetic, their communication against each other's."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.parallel import ParallelConfig
from shared.rehearsal.collectives import match
from shared.training.rehearsal_report import Played, stage_of
from shared.training.rehearse import UPDATES, mends, shortened
from shared.training.states import of_stages
from tests.workers import results_under_stubs

MiB = 2**20
WORKSPACES = 64 * MiB  # cuBLAS's of a Hopper, 32 MiB each of cuBLAS and cuBLASLt: torch allocates them


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int], object]:
    """What `rehearsal_worker.py` found."""
    return results_under_stubs(Path(__file__).with_name("rehearsal_worker.py"), tmp_path_factory.mktemp("played"))


@pytest.fixture(scope="module")
def played(results) -> dict[str, dict[int, Played]]:
    """Ranks by case."""
    found: dict[str, dict[int, Played]] = {}
    for (case, rank), result in results.items():
        if case in ("kernels", "loading"):
            continue
        assert isinstance(result, tuple), f"{case}, rank {rank}: {result} {getattr(result, 'trace', '')}"
        assert result[0].out_of_memory == ""
        found.setdefault(case, {})[rank] = result[0]
    return found


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_no_attention_falls_to_the_math_kernel(results, capability) -> None:
    """It keeps all scores. On A100, L40S, H100 and B200 torch has a fused kernel for what it is given."""
    chosen = results["kernels", capability]
    assert isinstance(chosen, dict), chosen
    assert len(chosen) == 14
    assert "math" not in chosen.values(), chosen


def test_states_are_the_bytes_of_mixed_precision(played) -> None:
    """2 of weights, 4 of gradients, 12 of main weights and Adam's moments for each parameter (arXiv:1910.02054, section 3.1; here
    gradients are fp32), in torch's blocks of 512 bytes."""
    from tests.layouts.cases import MODELS

    architecture = MODELS["GQA"]
    padding = (
        architecture.padded_vocab_size(1) - architecture.vocab_size
    )  # rows of the embedding and of the output layer
    parameters = architecture.parameter_count() + 2 * padding * architecture.hidden_size
    states = played["one GPU"][0].states - WORKSPACES
    assert 18 * parameters < states < 18 * parameters + 512 * 200


def test_moments_in_host_memory_are_not_on_the_gpu(played) -> None:
    """8 of the 18 bytes, but for blocks and the step of each parameter."""
    saved = played["one GPU"][0].states - played["moments in host memory"][0].states
    parameters = (played["one GPU"][0].states - WORKSPACES) // 18
    assert 8 * parameters - 512 * 200 < saved < 8 * parameters + 512 * 200


def test_the_arithmetic_of_states_is_what_ranks_hold(results, played) -> None:
    """To the byte with one data-parallel rank; with two, half of what pads the buffers is counted, too."""
    from tests.shared.training.rehearsal_worker import ARCHITECTURES, CASES, run

    for case, ranks in played.items():
        config = run(case).config
        for rank in ranks:
            expected = of_stages(config, ARCHITECTURES[CASES[case][0]])[stage_of(rank, config)]
            held = results[case, rank][1]
            assert (held["weights"], held["gradients"]) == (expected.weights, expected.gradients), (
                f"{case}, rank {rank}"
            )
            padding = 0 if config.parallel.data * config.parallel.context == 1 else 4096
            assert expected.optimizer - padding <= held["optimizer"] <= expected.optimizer, f"{case}, rank {rank}"
            assert held.get("moments on the host", 0) == expected.on_host, f"{case}, rank {rank}"


def test_a_load_joins_the_halves_of_gated_layers(results) -> None:
    """Gate and up projections are stored apart: `[96, 64]` each, of four layers, in bf16. Everything else is read in place."""
    assert results["loading", 0] == 4 * 2 * 96 * 64 * 2


def test_every_kind_of_run_is_played_to_its_end(played) -> None:
    for case, ranks in played.items():
        for each in ranks.values():
            phases = [phase.name for phase in each.phases]
            assert phases.count("building the model") == 1, case
            assert f"optimizer of update {UPDATES}" in phases, case
            assert each.states >= each.phases[3].before, case
            # A tiny model's moments come to the GPU all at once.
            fullest = "optimizer" if case == "moments in host memory" else "forward and backward"
            assert each.highest.name == f"{fullest} of update {UPDATES}", case
            assert each.activations > 0, case
            assert each.reserved >= each.peak > each.states, case


def test_ranks_of_every_layout_match(played) -> None:
    from tests.shared.training.rehearsal_worker import CASES

    for case, ranks in played.items():
        matched = match({rank: each.operations for rank, each in ranks.items()})
        assert matched.mismatch is None, case
        assert (matched.operations > 0) == (CASES[case][1] != {}), case


def test_a_change_of_one_rank_is_found(played) -> None:
    ranks = played["MoE, EP 2, TP 2 SP"]
    operations = {rank: list(each.operations) for rank, each in ranks.items()}
    kinds = {each.kind for each in operations[0]}
    assert {"alltoall_base_", "allreduce_", "_allgather_base_", "_reduce_scatter_base_"} <= kinds
    index = next(i for i, each in enumerate(operations[0]) if each.kind == "alltoall_base_")
    dropped = {**operations, 0: operations[0][:index] + operations[0][index + 1 :]}
    count = sum(each.kind == "alltoall_base_" for each in operations[0])
    said = f"group EXPERT_MODEL_PARALLEL_GROUP: rank 0 has {count - 1} operations and rank 2 {count}"
    assert match(dropped).mismatch.startswith(said)


def test_recomputation_keeps_less(played) -> None:
    assert sum(played["full recomputation"][0].kept.values()) < 0.5 * sum(played["one GPU"][0].kept.values())


def test_adapters_have_few_states(played) -> None:
    """No gradients and no optimizer's state of the model's weights: 2 bytes of each, and 18 of each number in the adapters."""
    from shared.training.plan import adapter_parameters
    from tests.layouts.cases import MODELS
    from tests.shared.training.rehearsal_worker import LORA

    parameters, adapters = MODELS["GQA"].parameter_count(), adapter_parameters(LORA, MODELS["GQA"])
    states = played["LoRA"][0].states - WORKSPACES
    assert 2 * parameters + 18 * adapters < states < 2 * parameters + 18 * adapters + 0.4 * MiB


def test_stages_in_the_front_keep_more(played) -> None:
    first, last = (played["interleaved pipeline"][rank] for rank in (0, 1))
    assert {each.kind for each in first.operations} >= {"send", "recv_"}
    assert first.kept.keys() != last.kept.keys()


def test_two_updates_of_so_many_micro_batches_are_played(make_config) -> None:
    """As many as there are in flight, never more than the run has."""
    config = shortened(make_config(global_batch_size=64, schedule="wsd", warmup_steps=3))
    assert (config.steps, config.micro_batches, config.validation_sequences) == (2, 2, 2)
    pipeline = ParallelConfig(processes=8, pipeline=4)
    assert shortened(make_config(global_batch_size=256, parallel=pipeline)).micro_batches == 4
    interleaved = replace(pipeline, virtual_pipeline=2)
    assert shortened(make_config(global_batch_size=256, parallel=interleaved)).micro_batches == 8
    assert shortened(make_config(global_batch_size=2)).micro_batches == 1


def test_what_is_tried_to_mend_costs_time_in_this_order(make_config) -> None:
    config = make_config(micro_batch_size=4, parallel=ParallelConfig(processes=2, tensor=2))
    flags, changed = zip(*mends(config), strict=True)
    assert flags == (
        *("--micro-batch-size 2", "--micro-batch-size 1", "--sequence-parallel"),
        *("--recompute selective", "--recompute full", "--recompute full --micro-batch-size 1"),
        *("--offload-optimizer", "--offload-optimizer --recompute full --micro-batch-size 1"),
    )
    assert [each.micro_batch_size for each in changed] == [2, 1, 4, 4, 4, 1, 4, 1]
    assert changed[2].parallel.sequence_parallel
    assert [each.recompute for each in changed[5:]] == [("full",), ("none",), ("full",)]
    assert [each.offload_optimizer for each in changed[5:]] == [False, True, True]
    least = make_config(micro_batch_size=1, recompute=("full",))
    assert [flags for flags, _ in mends(least)] == ["--offload-optimizer"]
    assert list(mends(replace(least, offload_optimizer=True))) == []
