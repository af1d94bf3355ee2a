"""Runs the table of layouts and records it in tools/pretrain/LAYOUTS.md: `record.py FOLDER [--missing]`.

Each cell is recorded with a hash of what its figures depend on: a second start goes on where the first was stopped, and after a
change. With --missing cells that were run with other code are left as they are. FOLDER keeps the checkpoints of one process. The
run takes hours of two cores; in a clone of the repository that is made for it, the code can be worked on meanwhile.

layouts.json: `runs`, NAME -> date, revision and machine; `cells`, LAYOUT -> MODEL -> run, code (the hash) and figures.
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
Record = dict[str, Any]

ABOUT = f"""# Layouts of training

Written by `make layouts`, which runs what has changed since. A cell resumes the checkpoint of one process (fp32, gloo, CPU, four
layers) at another layout and makes an update. Its number is the largest relative difference to one process: of loss, MTP loss,
gradient norm, the gradient of any weight, and of the next loss after one process resumed the layout's checkpoint. It must be
below {TOLERANCE:.0e}: sums in another order. A resume at the same layout must equal the run that went on, to the last digit. All
models but the first are trained on packed rows, with three tenths of the labels ignored. DP overlaps the reduction of gradients
and the gather of weights with computation. In pairs TP has sequence parallelism (SP). Dropout and prefix LMs are refused with CP.
"""


@cache
def common_code() -> str:
    """Hash of the code and data that all figures depend on."""
    worker = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
    return _hash(digest(DECIDING), worker, repr((LENGTH, VOCABULARY, ONE_SEGMENT)))


def code(layout: str, model: str) -> str:
    """Hash of what the figures of a cell depend on."""
    return _hash(common_code(), repr(LAYOUTS[layout]), model, repr(MODELS[model]))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


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


def page(record: Record) -> str:
    """LAYOUTS.md."""
    refusals: dict[str, int] = {}
    lines = []
    for layout, parallel in LAYOUTS.items():
        found, cells = record["cells"].get(layout, {}), []
        for model in MODELS:
            if reason := refusal(model, layout):
                cells.append(f"refused [{refusals.setdefault(short(reason), len(refusals) + 1)}]")
            elif not (cell := found.get(model)):
                cells.append("not run")
            elif passed(cell["figures"]):
                cells.append(f"{worst(cell['figures']):.0e}")
            else:
                cells.append(f"**failed** {worst(cell['figures']):.0e}" if cell["figures"] else "**failed**")
        lines.append(f"| {layout} | {parallel.processes} | {' | '.join(cells)} |")
    cells = [cell for models in record["cells"].values() for cell in models.values()]
    runs = [
        f"{sum(cell['run'] == name for cell in cells)} cells were run on {run['date']} at {run['revision']}, {run['machine']}."
        for name, run in record["runs"].items()
    ]
    largest = max((worst(cell["figures"]) for cell in cells if cell["figures"]), default=None)
    runs += [] if largest is None else [f"The largest difference is {largest:.0e}."]
    reasons = [f"{number}. {reason}" for reason, number in refusals.items()]
    heads = [f"| layout | ranks | {' | '.join(MODELS)} |", f"|---|---|{'---|' * len(MODELS)}"]
    return "\n".join([ABOUT, " ".join(runs), "", *heads, *lines, "", "Refused:", "", *reasons, ""])


def shortcomings(record: Record) -> list[str]:
    """Cells that failed."""
    return [
        f"{layout}: {model}: {cell['figures'] or 'an error'}"
        for layout, models in record["cells"].items()
        for model, cell in models.items()
        if not passed(cell["figures"])
    ]


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {packages}"


def main(folder: Path, *, missing: bool) -> int:
    record = load()
    chosen = to_run(record, missing=missing)
    print(f"{sum(map(len, chosen.values()))} cells of {len(chosen)} layouts", flush=True)
    if not run(folder / common_code(), record, chosen):
        return 1
    write(record)
    return 1 if shortcomings(record) else 0


def to_run(record: Record, *, missing: bool) -> dict[str, list[str]]:
    """Models by layout: of cells that were not run with this code, or with `missing` not at all."""
    cells = record["cells"]

    def due(layout: str, model: str) -> bool:
        return model not in cells.get(layout, {}) if missing else not recorded(record, layout, model)

    found = {layout: [model for model in legal(layout) if due(layout, model)] for layout in LAYOUTS}
    return {layout: models for layout, models in found.items() if models}


def run(folder: Path, record: Record, chosen: dict[str, list[str]]) -> bool:
    """Run cells, models by layout, and record each layout when it was run. Returns whether the runs of one process succeeded."""
    from tests.layouts import worker
    from tests.workers import forked_world

    if chosen and not (folder / "one.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not forked_world(1, worker.one_process, folder, list(MODELS)):
            return False
    now = {"date": datetime.now(UTC).date().isoformat(), "revision": revision(), "machine": machine()}
    name = next((name for name, run in record["runs"].items() if run == now), str(len(record["runs"]) + 1))
    for layout in sorted(chosen, key=lambda layout: LAYOUTS[layout].processes):
        started = time.monotonic()
        found = worker.run(folder, layout, chosen[layout])
        record["runs"][name] = now
        cells = {model: {"run": name, "code": code(layout, model), "figures": rounded(found[model])} for model in found}
        record["cells"][layout] = {**record["cells"].get(layout, {}), **cells}
        write(record)
        failed = [model for model, figures in found.items() if not passed(figures)]
        took = f"{layout}: {len(found)} models in {time.monotonic() - started:.0f} s"
        print(f"{took}; failed: {', '.join(failed)}" if failed else took, flush=True)
    return True


def recorded(record: Record, layout: str, model: str) -> bool:
    """Whether the cell was run with this code."""
    return record["cells"].get(layout, {}).get(model, {}).get("code") == code(layout, model)


def load() -> Record:
    record: Record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"runs": {}, "cells": {}}
    return record


def write(record: Record) -> None:
    """layouts.json and LAYOUTS.md, of the cells that exist and the runs that have some."""
    cells = record["cells"]
    kept = {
        layout: {model: cells[layout][model] for model in legal(layout) if model in cells[layout]}
        for layout in LAYOUTS
        if layout in cells
    }
    used = {cell["run"] for models in kept.values() for cell in models.values()}
    record = {"runs": {name: run for name, run in record["runs"].items() if name in used}, "cells": kept}
    for path, text in ((RECORD, json.dumps(record, indent=1) + "\n"), (PAGE, page(record))):
        written = path.with_name(f".{path.name}.new")  # a stop in between keeps the last record
        written.write_text(text, encoding="utf-8")
        written.replace(path)


def rounded(cells: Any) -> Any:
    if isinstance(cells, dict):
        return {name: rounded(value) for name, value in cells.items()}
    return float(f"{cells:.2g}") if isinstance(cells, float) else cells


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), missing="--missing" in sys.argv[2:]))
