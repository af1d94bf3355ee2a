"""Runs the table of layouts and records it in tools/pretrain/LAYOUTS.md: `record.py FOLDER`.

Each layout is recorded with a hash of what its figures depend on, as soon as it was run: a second start goes on where the first
was stopped, and after a change. FOLDER keeps the checkpoints of one process. In another copy of the repository, made for the
run, the code can change meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.layouts.cases import LAYOUTS, LENGTH, MODELS, ONE_SEGMENT, VOCABULARY, refusal
from tests.record_proofs import revision
from tools.convert.proofs import digest

ROOT = Path(__file__).resolve().parents[2]
RECORD, PAGE = (ROOT / "tools" / "pretrain" / name for name in ("layouts.json", "LAYOUTS.md"))
TOLERANCE = 1e-5  # fp32: sums in another order, of four layers
DECIDING = ("architecture", "kernels", "model", "parallel.py", "runtime", "training")

Figures = dict[str, Any]

ABOUT = f"""# Layouts of training

Written by `make layouts`, which runs what has changed since. A cell resumes the checkpoint of one process (fp32, gloo, CPU, four
layers) at another layout and makes an update. Its number is the largest relative difference to one process: of loss, MTP loss,
gradient norm, the gradient of any weight, and of the next loss after one process resumed the layout's checkpoint. It must be
below {TOLERANCE:.0e}: sums in another order. A resume at the same layout must equal the run that went on, to the last digit. All
models but the first are trained on packed rows, with three tenths of the labels ignored. DP overlaps the reduction of gradients
and the gather of weights with computation.
"""


@cache
def common_code() -> str:
    """Hash of the code, models and data that all figures depend on."""
    worker = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
    parts = (digest(DECIDING), worker, repr((MODELS, LENGTH, VOCABULARY, ONE_SEGMENT)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def code(layout: str) -> str:
    """Hash of what the layout's figures depend on."""
    return hashlib.sha256(f"{common_code()}\0{LAYOUTS[layout]!r}".encode()).hexdigest()[:16]


def legal(layout: str) -> list[str]:
    """Models that the layout is legal for."""
    return [model for model in MODELS if refusal(model, layout) is None]


def passed(figures: Figures) -> bool:
    return bool(figures) and figures["resumes equal"] and worst(figures) < TOLERANCE


def worst(figures: Figures) -> float:
    return float(max(figures[name] for name in ("update", "gradients", "resumed by one process")))


def short(reason: str) -> str:
    """A refusal without sizes and advice: one for all layouts with the same cause."""
    return re.sub(r"(--[a-z-]+) \d+", r"\1", reason.split("; give ")[0])


def page(record: dict[str, Any]) -> str:
    """LAYOUTS.md."""
    refusals: dict[str, int] = {}
    lines = []
    for layout, parallel in LAYOUTS.items():
        found, cells = record.get(layout, {}).get("models", {}), []
        for model in MODELS:
            if reason := refusal(model, layout):
                cells.append(f"refused [{refusals.setdefault(short(reason), len(refusals) + 1)}]")
            elif not (figures := found.get(model)):
                cells.append("not run" if figures is None else "**failed**")
            else:
                cells.append(f"{worst(figures):.0e}" if passed(figures) else f"**failed** {worst(figures):.0e}")
        lines.append(f"| {layout} | {parallel.processes} | {' | '.join(cells)} |")
    figures = [figures for run in record.values() for figures in run["models"].values() if figures]
    total = f"{len(figures)} cells, the largest difference {max(map(worst, figures)):.0e}." if figures else ""
    runs = dict.fromkeys(f"Run on {run['date']} at {run['revision']}, {run['machine']}." for run in record.values())
    reasons = [f"{number}. {reason}" for reason, number in refusals.items()]
    heads = [f"| layout | ranks | {' | '.join(MODELS)} |", f"|---|---|{'---|' * len(MODELS)}"]
    return "\n".join([ABOUT, " ".join([*runs, total]), "", *heads, *lines, "", "Refused:", "", *reasons, ""])


def shortcomings(record: dict[str, Any]) -> list[str]:
    """Cells that failed."""
    return [
        f"{layout}: {model}: {figures or 'an error'}"
        for layout, run in record.items()
        for model, figures in run["models"].items()
        if not passed(figures)
    ]


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {packages}"


def main(folder: Path) -> int:
    from tests.layouts import worker
    from tests.workers import forked_world

    record = load()
    stale = [layout for layout in LAYOUTS if record.get(layout, {}).get("code") != code(layout)]
    folder = folder / common_code()
    if stale and not (folder / "one.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not forked_world(1, worker.one_process, folder, list(MODELS)):
            return 1
    for layout in sorted(stale, key=lambda name: LAYOUTS[name].processes):
        started = time.monotonic()
        found = worker.run(folder, layout, legal(layout))
        about = {"date": datetime.now(UTC).date().isoformat(), "revision": revision(), "machine": machine()}
        record[layout] = {"code": code(layout), **about, "models": rounded(found)}
        write(record)
        failed = [model for model, figures in found.items() if not passed(figures)]
        took = f"{layout}: {len(found)} models in {time.monotonic() - started:.0f} s"
        print(f"{took}; failed: {', '.join(failed)}" if failed else took, flush=True)
    write(record)
    return 1 if shortcomings(record) else 0


def load() -> dict[str, Any]:
    """What was recorded, of the layouts that exist."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return {layout: record[layout] for layout in LAYOUTS if layout in record}


def write(record: dict[str, Any]) -> None:
    """layouts.json and LAYOUTS.md."""
    record = {layout: record[layout] for layout in LAYOUTS if layout in record}
    for path, text in ((RECORD, json.dumps(record, indent=1) + "\n"), (PAGE, page(record))):
        written = path.with_name(f".{path.name}.new")  # a stop in between keeps the last record
        written.write_text(text, encoding="utf-8")
        written.replace(path)


def rounded(cells: Any) -> Any:
    if isinstance(cells, dict):
        return {name: rounded(value) for name, value in cells.items()}
    return float(f"{cells:.2g}") if isinstance(cells, float) else cells


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
