import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from shared.runtime import cuda_on_cpu, device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU host layer is for machines without CUDA")


@pytest.fixture(autouse=True)
def installed():
    assert device.select_device() == torch.device("cpu")


def test_factories_put_cuda_tensors_on_the_cpu():
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device(), pin_memory=True),
        torch.ones_like(torch.zeros(2), device="cuda:1"),
        torch.zeros(1).new_tensor([2.0], device="cuda"),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(device="cuda:0", dtype=torch.bfloat16),
        torch.zeros(2).cuda(non_blocking=True),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
        torch.zeros(2).pin_memory(),
    ):
        assert tensor.device == torch.device("cpu")


def test_every_listed_factory_is_replaced():
    for name in cuda_on_cpu.FACTORIES:
        assert getattr(torch, name).__wrapped__ is not None


def test_other_devices_and_conversions_are_untouched():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert torch.zeros(2).type(torch.int32).dtype == torch.int32
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_optimizers_find_the_type_they_sort_by_and_torch_is_told_the_truth():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert not torch.zeros(1).is_cuda
    assert not torch.cuda.is_available()


def test_streams_and_events():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream()
    start.record()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(start)
        torch.zeros(2).record_stream(stream)
    end.record(stream)
    torch.cuda.synchronize()
    assert 0.0 <= start.elapsed_time(end) < 60_000.0
    assert stream.query()
    assert end.query()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()


def test_memory_figures_are_zero_rather_than_an_error():
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0


def test_the_cuda_generator_is_the_cpus():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_megatrons_generators_fork_and_come_back():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("own", 11)
    torch.manual_seed(1)
    outside = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("own"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), outside)
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(11)))


def test_it_holds_in_other_threads():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device="cuda").device.type))
    thread.start()
    thread.join()
    assert found == ["cpu"]


def test_loaders_copies_and_pickles_work():
    assert next(iter(DataLoader(list(range(4)), batch_size=4))).tolist() == [0, 1, 2, 3]
    parameter = torch.nn.Parameter(torch.ones(2))
    assert torch.equal(copy.deepcopy(parameter), parameter)
    assert torch.equal(pickle.loads(pickle.dumps(parameter)), parameter)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_nothing_is_touched_where_cuda_is_present():
    done = run_python(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "chosen = []\n"
        "torch.cuda.set_device = chosen.append\n"
        "before = dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(torch.Tensor))\n"
        "from shared.runtime import device\n"
        "import os; os.environ['LOCAL_RANK'] = '3'\n"
        "assert device.select_device() == torch.device('cuda', 3) and chosen == [torch.device('cuda', 3)]\n"
        "for owner, names in zip((torch, torch.cuda, torch.Tensor), before):\n"
        "    assert all(vars(owner)[name] is value for name, value in names.items())\n"
        "try:\n"
        "    device.cuda_on_cpu.install()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert done.stdout == "the CPU host layer must not be installed where CUDA is present\n", done.stderr


PARTS = """
import torch
from shared.runtime import device, world
from tests.workers import forked_world

def work(rank, lengths):
    device.select_device()
    world.join_world()
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.arange(2.0 * sum(lengths), dtype=dtype).reshape(-1, 2)
        parts = list(rows.split(lengths))
        gathered = torch.full_like(rows, -1)
        torch.distributed.all_gather(list(gathered.split(lengths)), parts[rank])
        assert torch.equal(gathered, rows)
        given = [(rank + 1) * part for part in parts]
        found = torch.full_like(parts[rank], -1)
        torch.distributed.reduce_scatter(found, given)
        assert torch.equal(found, 6 * parts[rank])
        assert all(torch.equal(each, (rank + 1) * part) for each, part in zip(given, parts))

if __name__ == "__main__":
    for lengths in ([2, 2, 2], [1, 0, 4], [3, 2, 0]):
        assert forked_world(3, work, lengths), lengths
"""


def test_parts_of_different_lengths_are_gathered_and_reduced():
    """In the first world all are equal, which gloo does by itself; in the others a part is empty."""
    done = run_python(PARTS)
    assert done.returncode == 0, done.stderr


def test_a_second_call_changes_nothing():
    before = torch.zeros
    device.select_device()
    assert torch.zeros is before
