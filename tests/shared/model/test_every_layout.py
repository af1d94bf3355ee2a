"""Losses are equal in every layout of two processes; our layout rules refuse what Megatron-Core cannot run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.architecture import dictionary
from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families import registry
from shared.parallel import ParallelConfig
from tests.workers import results_of


@pytest.fixture(scope="module")
def alone(worker, saved):
    return worker.train(worker.architecture(), ParallelConfig(), saved / "weights", torch.float32)[0]


@pytest.mark.parametrize("layout", ["dp2", "tp2", "tp2sp", "pp2", "pp2vp2"])
def test_losses_of_every_layout_equal_those_of_one_process(layout, alone, two_processes):
    # fp32 sums in another order: 1e-6 of a loss near 6 is a handful of last bits over three optimizer steps.
    assert two_processes[layout] == pytest.approx(alone, abs=1e-5)
    assert alone[0] > alone[1] > alone[2]


def test_bf16_with_recomputation_follows_fp32(alone, two_processes):
    # bf16 carries 8 bits: a relative error of 2^-8 in every activation moves a loss near 6 by well under 0.05.
    assert two_processes["bf16"] == pytest.approx(alone, abs=0.05)


def test_one_key_value_head_over_two_processes(two_processes):
    # The same sums cut in two, in fp32, of logits of size 1.
    assert two_processes["one group cut"] == pytest.approx(two_processes["one group one"], abs=1e-5)


def test_a_delta_net_with_tp_is_wrong_without_sequence_parallelism(worker, saved, two_processes):
    """Megatron-Core builds and runs it: only our rule refuses it."""
    alone = worker.train(worker.delta_net(), ParallelConfig(), saved / "delta_net", torch.float32)[0]
    right, wrong = two_processes["delta net with"], two_processes["delta net without"]
    assert right["losses"] == pytest.approx(alone, abs=1e-5)
    assert right["ranks apart"] == 0.0
    assert wrong["losses"][0] == pytest.approx(alone[0], abs=1e-5)  # before the first update
    assert wrong["ranks apart"] > 1e-3  # replicas of one weight, after three updates of 1e-3


# Every kind of attention, MLP, embedding and head.
SIZES = [
    *("qwen3-tiny", "gemma-tiny", "olmo2-tiny", "mpt-tiny", "opt-350m-tiny", "glm-10b-tiny", "qwen3-moe-tiny"),
    *("qwen2-moe-tiny", "gpt-oss-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "qwen3-next-tiny"),
]
LAYOUTS = [
    *({"processes": tensor, "tensor": tensor} for tensor in (2, 3, 4)),
    *({"processes": tensor, "tensor": tensor, "sequence_parallel": True} for tensor in (2, 4)),
    *({"processes": stages, "pipeline": stages} for stages in (2, 3)),
    {"processes": 2, "pipeline": 2, "virtual_pipeline": 2},
    *({"processes": experts, "expert": experts} for experts in (2, 3)),
    {"processes": 2, "tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1},
]
TENSOR = {"processes": 2, "tensor": 2, "sequence_parallel": True}


def changed(size: str, **values: dict) -> Architecture:
    return registry.sizes()[size].with_values(**values)


def odd_experts(size: str, **rows: int) -> Architecture:
    """A size whose experts have other FFN sizes."""
    moe = registry.sizes()[size].moe
    fields = {name: replace(getattr(moe, name), ffn_hidden_size=count) for name, count in rows.items()}
    return changed(size, moe=fields)


def case(architecture: Architecture, layout: dict, length: int = 16, micro_batches: int = 2) -> dict:
    fields = {"layout": layout, "length": length, "micro_batches": micro_batches}
    return {"architecture": architecture.to_dict(), **fields}


def cases() -> dict[str, dict]:
    """Sizes by layouts, and models and batches that break the rules which no tiny size breaks."""
    plain, twelve = registry.sizes()["qwen3-tiny"], changed("qwen3-tiny", attention={"heads": 12, "groups": 3})
    four = plain.with_values(num_layers=4)
    stages = {"processes": 2, "pipeline": 2, "virtual_pipeline": 2}
    return {
        **{f"{size} {layout}": case(registry.sizes()[size], layout) for size in SIZES for layout in LAYOUTS},
        "3 groups over 4": case(twelve, {"processes": 4, "tensor": 4}),
        "3 groups over 6": case(twelve, {"processes": 6, "tensor": 6}, length=18),
        "mlp": case(changed("qwen3-tiny", mlp={"ffn_hidden_size": 91}), {"processes": 2, "tensor": 2}),
        "experts": case(odd_experts("qwen3-moe-tiny", expert=33), TENSOR),
        "whole experts": case(odd_experts("qwen3-moe-tiny", expert=33), {**TENSOR, "expert": 2, "expert_tensor": 1}),
        "shared experts": case(odd_experts("qwen2-moe-tiny", shared=65), TENSOR),
        "mla queries": case(changed("deepseek-v3-tiny", attention={"q_lora_rank": 21}), TENSOR),
        "mla keys": case(changed("deepseek-v3-tiny", attention={"kv_lora_rank": 21}), TENSOR),
        "sequence": case(plain, TENSOR, length=15),
        "micro batches": case(four, stages, micro_batches=3),
        "more micro batches": case(four, stages, micro_batches=4),
    }


CASES = cases()


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str | None]:
    """Megatron-Core's error in each of CASES, or None."""
    directory = tmp_path_factory.mktemp("verdicts")
    (directory / "cases.json").write_text(json.dumps(CASES))
    worker = Path(__file__).with_name("verdicts_worker.py")
    return results_of(worker, directory)


@pytest.mark.parametrize("name", CASES)
def test_rules_refuse_what_megatron_core_cannot_run_and_nothing_else(name, errors):
    given, refused = CASES[name], None
    parallel = ParallelConfig(**given["layout"])
    try:
        parallel.check_model(dictionary.read(given["architecture"]))
        parallel.check_batch(
            sequence_length=given["length"],
            micro_batch_size=1,
            global_batch_size=given["micro_batches"] * parallel.data,
        )
    except UserError as error:
        refused = str(error)
    assert (refused is None) == (errors[name] is None), (refused, errors[name])
