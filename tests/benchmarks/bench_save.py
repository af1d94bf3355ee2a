"""What training waits for a save, blocking and with `--async-save`: `make bench-save`.

    python tests/benchmarks/bench_save.py [--processes 1 2] [--rounds 5] [--record]

A model is trained by data-parallel ranks, in fp32 on one thread each. A round is a blocking save, and then an asynchronous
one with updates until it is published. Figures are of the wall clock, and the median of the rounds:

    blocking    seconds of the blocking save
    waits       those of the asynchronous one: until the next update can begin, and in the polls after updates
    share       waits / blocking. The goal is 10% at most; above it the exit code is 1
    longer      by which the updates until it is published are longer than others, as a share of blocking: writers take turns with
                training where there are no cores for them, and pages that training changes are copied
    published   seconds until the asynchronous save is complete
    memory      bytes of the second copy of rank 0, the largest seen; plan: what a run's plan says that it takes at most; above it
                the exit code is 1

With overlap a save first gathers the weights, which the next forward pass does otherwise. That time is in neither save.
`--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_train import RESULTS, Shape, machine, record_path  # noqa: E402

GOAL = 0.1
SHAPES = {
    "tiny": Shape(layers=1, hidden=32, ffn=64, heads=2, groups=1, vocab=128, sequence=16, micro=1, global_=2),
    "50m": Shape(layers=4, hidden=1024, ffn=2816, heads=16, groups=4, vocab=4096, sequence=64, micro=1, global_=2),
}


def rank(name: str, rounds: int, processes: int, directory: Path) -> None:
    """One rank; rank 0 writes `directory/found.json`."""
    import torch

    from shared.checkpoint.directory.run_directory import RunDirectory
    from shared.cli import invoked
    from shared.families import registry
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups
    from shared.training.loop import forward_backward
    from shared.training.optimizer import build_optimizer, gather_weights, wrap
    from shared.training.plan import snapshot_estimate
    from shared.training.recorder import SharedRunDirectory
    from shared.training.saver import Saver
    from tests.benchmarks.training_ways import Random, built, configuration, training_config

    torch.set_num_threads(1)
    shape = SHAPES[name]
    config = replace(training_config(shape), parallel=ParallelConfig(processes=processes), async_save=True)
    device = process_groups.initialize(config.parallel, 1)
    architecture = registry.from_config(configuration(shape))
    model = wrap([built(architecture, config, torch.float32)], overlap=config.overlap)
    optimizer = build_optimizer(config, model)
    data, updates = Random(shape), 0

    def update() -> float:
        nonlocal updates
        torch.distributed.barrier()
        started = time.perf_counter()
        forward_backward(config, model, data, updates * shape.global_, device)
        optimizer.step()
        torch.distributed.barrier()  # otherwise the first to end would wait in the poll
        updates += 1
        return time.perf_counter() - started

    def ready() -> float:
        gather_weights(model)
        torch.distributed.barrier()
        return time.perf_counter()

    first = torch.distributed.get_rank() == 0
    # Stands in for the recorder of a run, which writes its report before a save.
    recorder = SimpleNamespace(saving=lambda: None, saved=lambda step: None, facts=lambda step: {})
    found = []
    with invoked("pretrain", "train", {}):
        opened = RunDirectory.open(directory / "run", kind="megatron", inputs={}) if first else None
        saver = Saver(config, SharedRunDirectory(directory / "run", None, opened), recorder, model, optimizer, device)
        for _ in range(1 + rounds):
            plain = statistics.median(update() for _ in range(3))
            started = ready()
            saver.save(updates, finished=False, last=True)
            blocking = time.perf_counter() - started
            update()
            started = ready()
            saver.save(updates, finished=False, last=False)
            waits, longer, done = time.perf_counter() - started, 0.0, False
            with children_watched() as memory:
                while not done:
                    longer += update() - plain
                    polled = time.perf_counter()
                    done = saver.poll()
                    waits += time.perf_counter() - polled
            published = time.perf_counter() - started
            found.append(
                {
                    **{"blocking": blocking, "waits": waits, "share": waits / blocking},
                    **{"longer": longer / blocking, "published": published, "memory": max(memory)},
                }
            )
    if first:
        middle = {key: float(f"{statistics.median(each[key] for each in found[1:]):.4g}") for key in found[0]}
        plan = snapshot_estimate(config, architecture)
        (directory / "found.json").write_text(json.dumps({**middle, "plan": plan, "rounds": rounds}))
    process_groups.destroy()


@contextlib.contextmanager
def children_watched() -> Iterator[list[int]]:
    """What forked processes of this one do not share with it any more: bytes, looked up often until the end."""
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.append(sum(_own_memory(child) for child in _children()))

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ended.set()
    thread.join()


def _children() -> list[str]:
    files = Path("/proc/self/task").glob("*/children")
    return [child for file in files for child in file.read_text(encoding="ascii").split()]


def _own_memory(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def measure(name: str, processes: int, rounds: int) -> dict[str, Any]:
    """The figures of a world of so many ranks."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-save-") as directory:
        words = [
            sys.executable,
            __file__,
            f"--size={name}",
            f"--processes={processes}",
            f"--rounds={rounds}",
            f"--of={directory}",
        ]
        subprocess.run(words, check=True)
        found: dict[str, Any] = json.loads((Path(directory) / "found.json").read_text(encoding="utf-8"))
        return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| model, ranks | blocking | waits | share | updates longer by | published after | second copy per rank | plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        lines.append(
            f"| {name} | {each['blocking']:.2f} s | {each['waits']:.3f} s | {each['share']:.1%} | {each['longer']:.0%} | "
            f"{each['published']:.1f} s | {each['memory'] / 1e6:,.0f} MB | {each['plan'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="50m")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)  # directory of a world, made by `measure`
    given = parser.parse_args(words)
    if given.of:
        from shared.runtime.launch import launch
        from shared.runtime.silence_warnings import silence

        (processes,) = given.processes
        code = launch(processes)
        if code is None:
            silence()
            rank(given.size, given.rounds, processes, given.of)
        return code or 0
    found = {f"{given.size}, {number}": measure(given.size, number, given.rounds) for number in given.processes}
    described = machine()
    print(f"{described}\n\n{table(found)}", flush=True)
    if given.record:
        given.results.mkdir(exist_ok=True)
        path = record_path(described, given.results, of="save")
        path.write_text(json.dumps({"machine": described, "results": found}, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {path}")
    marks = [
        f"ABOVE THE GOAL {name}: {each['share']:.1%} of a blocking save, goal {GOAL:.0%}"
        for name, each in found.items()
        if each["share"] > GOAL
    ]
    marks += [
        f"ABOVE THE PLAN {name}: {each['memory'] / 1e6:,.0f} MB, the plan says {each['plan'] / 1e6:,.0f} at most"
        for name, each in found.items()
        if each["memory"] > each["plan"]
    ]
    print("".join(f"{mark}\n" for mark in marks), end="")
    return 1 if marks else 0


if __name__ == "__main__":
    raise SystemExit(main())
