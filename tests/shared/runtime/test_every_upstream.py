"""Internals of torch and Megatron-Core that the CPU host layer relies on: docs/upstream.md."""

from __future__ import annotations

import ast
import inspect
from datetime import timedelta
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu
from torch.utils import _device

from shared.runtime import cuda_on_cpu, device
from tests.upstream import calls, relies_on

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU host layer is for machines without CUDA")
HOST = "shared/runtime/cuda_on_cpu.py"
# Of Megatron-Core; what is left out is not run here: inference, FSDP, emerging optimizers.
FOLDERS = ("datasets", "dist_checkpointing", "distributed", "fusions", "models/common", "models/gpt", "optimizer",
           "pipeline_parallel", "ssm", "tensor_parallel", "transformer")  # fmt: skip


@pytest.fixture(autouse=True)
def _installed() -> None:
    device.select_device()


def test_device_contexts_know_functions_by_a_cached_table() -> None:
    table = _device._device_constructors()
    assert table is _device._device_constructors(), HOST
    assert torch.empty.__wrapped__ in table, HOST
    relies_on(HOST, _device.DeviceContext.__torch_function__, "func in _device_constructors()")


def test_factories_given_cuda_are_replaced() -> None:
    asked = set()
    for folder in FOLDERS:
        for path in (Path(megatron.core.__file__).parent / folder).rglob("*.py"):
            if "fsdp" not in path.parts:
                asked |= _factories(path)
    assert {"empty", "zeros", "tensor"} <= asked
    lacking = {name for name in asked if callable(getattr(torch, name))} - {*cuda_on_cpu.FACTORIES, "device"}
    assert not lacking, f"Megatron-Core calls {sorted(lacking)} with device=: re-read {HOST}"


def _factories(path: Path) -> set[str]:
    """Functions of torch that a file calls with `device=`."""
    text = path.read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(text)) if "device=" in text else ()
    return {
        node.func.attr
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and any(keyword.arg == "device" for keyword in node.keywords)
    }


def test_names_of_torch_cuda_that_are_replaced() -> None:
    own = {name for name, value in vars(torch.cuda).items() if inspect.getmodule(value) is cuda_on_cpu}
    assert {"current_device", "Stream", "synchronize", "set_rng_state"} <= own
    assert own <= set(torch.cuda.__all__), f"torch.cuda lacks {own - set(torch.cuda.__all__)}: re-read {HOST}"
    for name in ("default_generators", "initial_seed"):
        assert name in torch.cuda.__all__, HOST
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark", "range"):
        assert name in torch.cuda.nvtx.__all__, HOST


def test_functions_of_torch_that_call_replaced_ones() -> None:
    calls(HOST, torch.random._manual_seed_impl, "torch.cuda.manual_seed_all", "seed")
    relies_on(HOST, torch.cuda._lazy_call, "is_initialized()")
    relies_on(HOST, torch.cuda._lazy_init, "is_initialized()")
    assert (random._lazy_call, random._lazy_init) == (torch.cuda._lazy_call, torch.cuda._lazy_init), HOST
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0, HOST


def test_optimizers_sort_parameters_by_the_name_of_their_type() -> None:
    relies_on(
        HOST, DistributedOptimizer._build_model_and_main_param_groups, "model_param.type() == 'torch.cuda.FloatTensor'"
    )


def test_split_sizes_stay_tensors_off_a_gpu() -> None:
    sizes = torch.tensor([1, 2])
    assert maybe_move_tensor_to_cpu(sizes, as_numpy=True) is sizes, f"re-read _replace_all_to_all of {HOST}"
    calls(HOST, mappings._AllToAll.forward, "torch.distributed.all_to_all_single", "output", "input")


def test_parts_are_gathered_and_scattered_by_torch_distributed() -> None:
    gathered = ("output_tensor_list", "input_")
    calls(HOST, mappings._gather_along_first_dim, "torch.distributed.all_gather", *gathered, group="group")
    scattered = ("output", "input_tensor_list")
    calls(HOST, mappings._reduce_scatter_along_first_dim, "torch.distributed.reduce_scatter", *scattered, group="group")


def test_a_group_of_gloo_is_made_of_a_store_an_address_and_a_timeout() -> None:
    ours = "re-read _group of shared/runtime/weight_broadcast.py"
    options = torch.distributed.ProcessGroupGloo._Options()
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=3)
    group = torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1, options)
    assert (group.rank(), group.size(), group.options._timeout) == (0, 1, timedelta(seconds=3)), ours
