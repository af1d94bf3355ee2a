"""The lists of functions against torch's libraries, and what torch reads of a GPU that is not there."""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.rehearsal import build_stubs

ROOT = Path(__file__).resolve().parents[3]
TORCH = build_stubs.torch_folder()


@pytest.mark.parametrize(
    ("part", "wanted"), [("runtime", build_stubs.wanted_of_runtime), ("driver", build_stubs.wanted_of_driver)]
)
def test_torch_wants_what_there_is(part, wanted) -> None:
    """Every function that torch takes from CUDA is looked through: a new torch's new ones fail here, by name."""
    known = build_stubs.answering_zero(part) | build_stubs.written_out(part)
    assert wanted(TORCH) - known == set(), f"look each up, then add it to stubs/{part}.names or write it in {part}.cpp"
    assert known - wanted(TORCH) == set(), "torch does not want these any more"
    assert not build_stubs.answering_zero(part) & build_stubs.written_out(part)


def test_functions_with_results_do_not_answer_zero() -> None:
    """A list entry leaves what its arguments point to unset: sizes, counts and handles are written out."""
    results = re.compile(
        r"cuda(Get|Malloc$|Host(Alloc|Malloc)|MemGetInfo|Pointer|Event(Create|Elapsed)|Stream(Create|Is))"
    )
    unset = {name for name in build_stubs.answering_zero("runtime") if results.match(name)}
    assert unset == set()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An environment without stubs."""
    monkeypatch.setattr(build_stubs, "stubs_folder", lambda: tmp_path / "stubs")
    return tmp_path / "stubs"


def test_without_a_compiler_one_line_says_so(elsewhere, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    build_stubs.main()
    assert capsys.readouterr().err == (
        "no stubs of the CUDA runtime, so no --rehearse here: g++ and nm not found; install g++ (Debian: apt-get install g++), "
        "then `make setup` again\n"
    )
    with pytest.raises(UserError, match="cannot be built here: g\\+\\+ and nm not found"):
        build_stubs.ensure()
    assert not elsewhere.exists()


def test_stubs_are_built_once_for_sources_and_torch(elsewhere, monkeypatch) -> None:
    """And a function that the lists lack is named."""
    known = build_stubs.answering_zero
    monkeypatch.setattr(
        build_stubs, "answering_zero", lambda part: known(part) - {"cudaProfilerStart", "cuLaunchKernel"}
    )
    assert build_stubs.ensure() == ["cudaProfilerStart", "cuLaunchKernel"]
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", elsewhere / build_stubs.RUNTIME], capture_output=True, text=True, check=True
    )
    assert build_stubs.wanted_of_runtime(TORCH) <= {line.split()[-1] for line in exported.stdout.splitlines()}
    built = (elsewhere / build_stubs.RUNTIME).stat().st_ino
    build_stubs.ensure()
    assert (elsewhere / build_stubs.RUNTIME).stat().st_ino == built
    monkeypatch.setattr(build_stubs, "_made_from", lambda torch: "other sources")
    build_stubs.ensure()
    assert (elsewhere / build_stubs.RUNTIME).stat().st_ino != built


def test_two_processes_build_at_once(elsewhere, monkeypatch) -> None:
    """Each has written its file when either moves one into place."""
    both, replace = threading.Barrier(2, timeout=60), Path.replace

    def together(path: Path, target: Path) -> Path:
        both.wait()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", together)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: build_stubs.build(), range(2))) == [None, None]
    names = {build_stubs.RUNTIME, build_stubs.DRIVER, build_stubs.UNCHECKED, build_stubs.MADE_FROM}
    assert {path.name for path in elsewhere.iterdir()} == names


_PROGRAM = """
import json, torch
GiB = 2**30
said = {}
properties = torch.cuda.get_device_properties(0)
said["properties"] = [properties.name, properties.major, properties.minor, properties.total_memory,
    properties.multi_processor_count, properties.warp_size,
    properties.max_threads_per_multi_processor, properties.regs_per_multiprocessor,
    properties.shared_memory_per_block, properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor,
    properties.L2_cache_size, properties.is_integrated]
tokens = torch.arange(100_000).cuda()  # rows of tokens go there and back
said["there and back"] = bool((tokens.cpu() == torch.arange(100_000)).all())
sent = torch.full((1000,), torch.nan).cuda()
copied = sent.clone()
said["copied"] = bool(copied.isnan().cpu().any() or not copied.cpu().isnan().all())
del sent, copied
said["computed"] = max(torch.ones(size, device="cuda").mul(2).cpu().abs().sum().item() for size in (250, 999, 1001))
said["part"] = torch.full((1000,), torch.nan).cuda()[3].item()
a = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
before = torch.cuda.memory_allocated()
b = a @ a
said["product"] = torch.cuda.memory_allocated() - before - 4096 * 4096 * 2
b.sum().backward()
said["gradient"] = [a.grad.device.type, a.grad.shape[0], a.grad[0, 0].item()]
kept = torch.empty(8 * GiB, dtype=torch.uint8, device="cuda")
said["free"] = torch.cuda.mem_get_info()[0] < 8 * GiB
try:
    torch.empty(12 * GiB, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    said["out of memory"] = str(error)[:120]
del kept
torch.empty(12 * GiB, dtype=torch.uint8, device="cuda")
said["host"] = int(open("/proc/self/statm").read().split()[1]) * 4096
print(json.dumps(said))
"""


def test_torch_reads_what_the_stubs_say() -> None:
    build_stubs.ensure()
    folder = build_stubs.stubs_folder()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        env={
            **os.environ,
            "LD_PRELOAD": str(folder / build_stubs.RUNTIME),
            "LD_LIBRARY_PATH": str(folder),
            "BATON_STUB_NAME": "a stub",
            "BATON_STUB_MEMORY": str(20 * 2**30),
            "BATON_STUB_LIMIT": str(16 * 2**30),
            "BATON_STUB_CAPABILITY": "100",
            "BATON_STUB_PROCESSORS": "148",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    # NVIDIA's tables of compute capability 9.0 and 10.0, but name, memory and processors, which are the environment's
    assert said["properties"] == [
        *("a stub", 10, 0, 20 * 2**30, 148),
        *(32, 2048, 65536, 48 * 1024, 227 * 1024, 228 * 1024, 50 * 2**20, False),
    ]
    assert said["there and back"]
    assert not said["copied"]  # what was sent is copied; nothing is computed of it
    assert said["computed"] == 0.0  # in memory that something else was sent to
    assert said["part"] == 0.0
    assert said["product"] in range(0, 64 * 2**20)  # and cuBLAS's workspace
    assert said["gradient"] == ["cuda", 4096, 0.0]
    assert said["free"]
    assert said["out of memory"].startswith(
        "CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has a total capacity of 20.00 GiB of which"
    )
    assert said["host"] < 2 * 2**30
