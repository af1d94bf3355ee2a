"""What a rehearsal says a run's peak memory is, beside what torch's allocator measures of the same run: `make bench-rehearsal`.

    python tests/benchmarks/bench_rehearsal.py [--record] [NAME...]

Real runs on the CPU, under torch's profiler with its memory events; `rehearsal_truth.py` has the cases and says what is alike.
Peaks in MiB, and the part of them that the forward and backward passes of the last update add to its states. `--record` keeps
them in `results/`, those of NAMEs beside what is there. One that is 3% off ends it with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shared.rehearsal.machine import GPUS, MiB  # noqa: E402
from shared.rehearsal.reexecute import with_stubs  # noqa: E402
from tests.benchmarks.bench_train import RESULTS, machine  # noqa: E402

WORKER = Path(__file__).with_name("rehearsal_truth.py")
TOLERANCE = 0.03  # of the peak; the blocks of 512 bytes of CUDA's allocator are in it
PASSES = "forward and backward of update 2"
# A CPU has no workspaces of cuBLAS: 32 MiB each of cuBLAS and cuBLASLt on a Hopper, in every rehearsal otherwise.
_NO_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "CUBLASLT_WORKSPACE_SIZE": "0"}

type Phases = Mapping[str, Sequence[int]]  # bytes allocated when it began, and at most


def peaks(where: str, names: Sequence[str]) -> dict[str, Phases]:
    """Of each case, its phases. `where`: cpu, the real run, or stubs, the rehearsal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if where == "stubs":
        environment = with_stubs(environment | _NO_WORKSPACES, GPUS["h100-80"])
    done = subprocess.run(
        [sys.executable, WORKER, where, *names], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: dict[str, Phases] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each case the bytes measured and rehearsed."""
    real, said = peaks("cpu", names), peaks("stubs", names)
    found = {}
    for name in real:
        of = {"measured": real[name], "rehearsed": said[name]}
        found[name] = {
            way: {
                "peak": max(peak for _, peak in phases.values()),
                "passes": phases[PASSES][1] - phases[PASSES][0],
                "phase": max(phases, key=lambda phase: phases[phase][1]),
            }
            for way, phases in of.items()
        }
    return found


def difference(of: Mapping[str, Any], figure: str = "peak") -> float:
    """Of what is rehearsed from what is measured."""
    return float(of["rehearsed"][figure] / of["measured"][figure] - 1)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, in MiB."""
    lines = ["| run | peak measured | rehearsed | | passes measured | rehearsed | |", "|---|---|---|---|---|---|---|"]
    for name, of in found.items():
        cells = [
            f"{of['measured'][each] / MiB:.2f} | {of['rehearsed'][each] / MiB:.2f} | {difference(of, each):+.2%}"
            for each in ("peak", "passes")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args(words)
    found = compared(given.names)
    print(table(found), flush=True)
    if given.record:
        path = RESULTS / "rehearsal-cpu.json"
        before = json.loads(path.read_text(encoding="utf-8"))["results"] if given.names and path.exists() else {}
        content = {"machine": machine(), "results": before | found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(difference(of)) > TOLERANCE for of in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
