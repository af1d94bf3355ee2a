"""Throughput of conversions relative to copying the same bytes: `make bench-convert`.

Each round runs every task once, so background load affects all tasks alike; ratios are within a round. Outputs are removed
after each task; the source stays in the page cache. Other converters (`make peers` installs them) run once, afterwards.
`--shapes gpt-oss-20b` measures 42 GB, which takes 130 GB of disk, and of memory what the other converters hold: the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

from tests.benchmarks.checkpoints import ASKED_FOR, SHAPES, generate  # noqa: E402
from tests.benchmarks.measured import Measured, measure  # noqa: E402

HERE = Path(__file__).parent
COPY, DURABLE = "copy (`cp -r`)", "copy, and on the disk (`cp -r`, `sync`)"
REWRITE = "mmap, and safetensors rewritten"
_MADV_POPULATE_WRITE = 23  # linux/mman.h
_BESIDE = 1 << 30  # bytes of memory that a piece of work may want beside its output
PEERS = {"Megatron-Bridge": "by_bridge.py", "mbridge": "by_mbridge.py", "mcore-bridge": "by_mcore_bridge.py"}
PEERS_PYTHON = ROOT / "tests" / "peers" / ".venv" / "bin" / "python"


def works(folder: Path) -> dict[str, list[str | Path]]:
    """{what: command that makes `folder/out` of `folder/hf` or, on the way back, of `folder/megatron`}."""
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    work = [sys.executable, HERE / "work.py"]
    durable = f"cp -r '{hf}' '{out}' && find '{out}' -exec sync {{}} +"
    return {
        COPY: ["cp", "-r", hf, out],
        DURABLE: ["sh", "-c", durable],
        REWRITE: [*work, "rewrite", hf, out],
        "to-megatron": [*work, "to-megatron", hf, out],
        "to-hf": [*work, "to-hf", megatron, out],
        "to-megatron, without hashes": [*work, "bare-to-megatron", hf, out],
        "to-hf, without hashes": [*work, "bare-to-hf", megatron, out],
    }


def peer_works(folder: Path) -> dict[str, list[str | Path]]:
    """The same of other programs."""
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    works: dict[str, list[str | Path]] = {}
    for peer, script in PEERS.items():
        ask = f"import importlib.metadata; print(importlib.metadata.version({peer!r}))"
        version = subprocess.run([PEERS_PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        program = [PEERS_PYTHON, PEERS_PYTHON.parents[2] / script]
        works[f"{peer} {version}, to Megatron"] = [*program, "to-megatron", hf, out]
        works[f"{peer} {version}, to Hugging Face"] = [*program, "to-hf", megatron, hf, out]
    return works


def bench(shape: str, rounds: int, peer_rounds: int, folder: Path) -> list[str]:
    """Lines of a Markdown table."""
    size = generate(folder / "hf", SHAPES[shape])
    commands = works(folder)
    measure([*commands["to-megatron"][:-1], folder / "megatron"])
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            settle(folder, size)
            found[name].append(measure(command))
    failures = []
    for name, command in (peer_works(folder) if peer_rounds else {}).items():
        try:
            found[name] = [measure_peer(command, folder, size) for _ in range(peer_rounds)]
        except RuntimeError as error:
            failures.append(f"{name}: {str(error).strip().splitlines()[-1]}")
    shutil.rmtree(folder)
    lines = [
        f"### {shape}: {size / 1e9:.2f} GB, {rounds} rounds",
        "",
        "| work | wall s: median (range) | of the copy | of the durable copy | of the rewrite | processor s | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    return (
        lines
        + [row(name, runs, [found[floor] for floor in (COPY, DURABLE, REWRITE)]) for name, runs in found.items()]
        + ["", *failures]
        + ([""] if failures else [])
    )


def measure_peer(command: list[str | Path], folder: Path, size: int) -> Measured:
    """RuntimeError where it fails, wants more memory than there is, or leaves out some of the weights."""
    settle(folder, size)
    found = measure(command, first_to_end=True)
    written = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    if written < size:
        raise RuntimeError(f"wrote {written} bytes of {size}, and said nothing")
    return found


def row(name: str, runs: list[Measured], floors: list[list[Measured]]) -> str:
    """One line of the table."""

    def middle(value: Callable[[Measured], float]) -> float:
        return statistics.median(value(run) for run in runs)

    def ratio(floor: list[Measured]) -> float:
        return statistics.median(run.seconds / other.seconds for run, other in zip(runs, floor, strict=False))

    seconds = [run.seconds for run in runs]
    return (
        f"| {name} | {middle(lambda run: run.seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) "
        f"| {' | '.join(f'{ratio(floor):.2f}' for floor in floors)} | {middle(lambda run: run.processor):.2f} "
        f"| {max(run.memory for run in runs) / 1e6:.0f} |"
    )


def settle(folder: Path, size: int) -> None:
    """Nothing of the work before is left to be done, by the disk either, and free memory is at hand.

    A virtual machine gives free pages back to its host and gets them again one fault at a time, which can cost more than
    the copy: whoever comes first would pay for it. Large pages are asked for and then small ones, since the kernel hands
    out both for a file that is written.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    wanted = min(size + _BESIDE, free * 9 // 20)
    large, small = (mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
    large.madvise(mmap.MADV_HUGEPAGE)
    for memory in (large, small):
        with contextlib.suppress(OSError):  # a kernel before 5.14
            memory.madvise(_MADV_POPULATE_WRITE)
    small.close()
    large.close()


def machine() -> str:
    """A line that says where it ran."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{len(os.sched_getaffinity(0))} processors ({cpu}), {memory:.0f} GiB of memory, Linux {platform.release()}, "
        f"Python {platform.python_version()}; load before: {os.getloadavg()[0]:.1f}"
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name not in ASKED_FOR]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-rounds", type=int, default=int(PEERS_PYTHON.exists()), help="of other programs")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-work", help="a directory to be made and removed")
    given = parser.parse_args(words)
    print(f"{machine()}\n", flush=True)
    given.work.mkdir(parents=True)
    try:
        for shape in given.shapes:
            print("\n".join(bench(shape, given.rounds, given.peer_rounds, given.work / shape)), flush=True)
    finally:
        shutil.rmtree(given.work)
    if not given.peer_rounds:
        print(f"Not measured: {', '.join(PEERS)}; `make peers` installs them.")


if __name__ == "__main__":
    main()
