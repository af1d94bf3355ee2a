"""Convergence of FP8 training beside bf16 and fp32, on the standard library's source: `make bench-fp8`.

    python tests/benchmarks/bench_fp8.py --work DIR [--size 20m] [--updates 500] [--seeds 3] [--record]

Every cell, a precision and a seed (of the weights and of the order of the data), is one run of `pretrain train`. A finished
cell is kept, a killed one is resumed from its last save: stop at any time, and run the same command again. With `--record` a cell
goes into `results/` when it is finished, and cells that are there are not trained again, on whatever machine: only the same text
and number of updates make them comparable, which is checked.

The hard case has outlier channels planted in the weights: the rows of one query head, 2^16 times as large. The query norm takes
the factor out, so that the model computes the same; a scale of the whole matrix drowns the other heads, one of blocks does not.
It is run with the guard and, tensorwise, without.

A CPU without bf16 units computes bf16 and FP8 products in fp32 (`cpu_products`): the same numbers but for the order of fp32 sums,
many times as fast.

Written are a page with the curves in one picture and the table, and the figures as JSON, in --work; `--record` copies both to
`results/`. The table gives the mean loss over the last tenth of the updates, relative to bf16 with the same seed, beside the
differences of bf16 seeds from each other: below that floor a difference says nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).with_name("results")

WAYS: dict[str, dict[str, str]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    **{name: {"precision": "fp8", "fp8-recipe": name} for name in ("tensorwise", "delayed", "rowwise", "blockwise")},
}
HARD = ("bf16", "tensorwise", "tensorwise without guard", "rowwise", "blockwise")
UNGUARDED = " without guard"
OUTLIER = 2.0**16
GOALS = {"blockwise": 0.0025, "tensorwise": 0.005, "delayed": 0.005}  # of the relative difference

_TOOL = "import sys; from tools.pretrain.cli import tool; tool.run(sys.argv[1:])"
# There is no flag for it: what the guard prevents is shown here only.
_FAST = "from tests.benchmarks import cpu_products as c; c.needed() and c.install(); "
_WITHOUT_GUARD = (
    "from shared.kernels.fp8 import tensor_state as t; t.CLIPPED_LIMIT = t.UNDERFLOW_LIMIT = float('inf'); "
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, of Qwen3's kind, and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    sequence: int
    batch: int  # sequences
    modules: int  # files of the standard library

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.sequence,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }


SIZES = {
    "tiny": Size(layers=3, hidden=64, ffn=128, heads=4, groups=2, vocab=320, sequence=32, batch=4, modules=12),
    "20m": Size(layers=6, hidden=512, ffn=1536, heads=8, groups=4, vocab=4096, sequence=256, batch=2, modules=100_000),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    way: str
    seed: int
    hard: bool

    @property
    def name(self) -> str:
        return f"{'hard-' * self.hard}{self.way.replace(' ', '-')}-{self.seed}"


def cells(seeds: int) -> list[Cell]:
    """All, the seeds one after another: after the first third there is a table of one seed."""
    plain = [Cell(way=way, seed=seed, hard=False) for seed in range(1, seeds + 1) for way in WAYS]
    return plain[: len(WAYS)] + [Cell(way=way, seed=1, hard=True) for way in HARD] + plain[len(WAYS) :]


def prepare(work: Path, size: Size, seeds: int) -> None:
    """Text, tokenizer, tokens and models, each made once."""
    text = work / "text.jsonl"
    if not text.exists():
        partial = text.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for source in sources(size.modules):
                file.write(json.dumps({"text": source}) + "\n")
        partial.rename(text)
    common = f"--source {text}".split()
    vocab, options = ["--vocab-size", str(size.vocab)], ["--workers", "1"]
    pretrain("tokenizer", *common, "--target", work / "tokenizer", *vocab)
    pretrain("prepare", *common, "--target", work / "corpus", "--tokenizer", work / "tokenizer", *options)
    for seed, hard in [*((seed, False) for seed in range(1, seeds + 1)), (1, True)]:
        make_model(work / f"model{'-hard' * hard}-{seed}", size, seed, hard)


def sources(modules: int) -> Iterator[str]:
    """The standard library's modules, in order of their path, without tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts})
    for path in itertools.islice(paths, modules):
        yield path.read_text(encoding="utf-8", errors="replace")


def make_model(directory: Path, size: Size, seed: int, hard: bool) -> None:
    """Random weights in Megatron-Core's format; `hard`: with the outlier channels."""
    if directory.exists():
        return
    from shared.families import registry
    from tests.training_runs import random_model

    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    random_model(partial, registry.from_config(size.config()), plant if hard else lambda chunk: None, seed=seed)
    partial.rename(directory)


def plant(chunk: Any) -> None:
    """The rows of the first query head of each layer, which are the first of `linear_qkv`, times OUTLIER."""
    import torch

    with torch.no_grad():
        for layer in chunk.decoder.layers:
            layer.self_attention.linear_qkv.weight[: chunk.config.kv_channels] *= OUTLIER


def pretrain(*words: str | Path, guard: bool = True) -> None:
    """The tool, in a process of its own. RuntimeError with what it said."""
    program = ("" if torch_is_cuda() else _FAST) + ("" if guard else _WITHOUT_GUARD)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program + _TOOL, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"pretrain {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")


def torch_is_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def finished(target: Path) -> bool:
    file = target / "manifest.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["state"] == "finished"


def train(work: Path, size: Size, cell: Cell, updates: int) -> None:
    """One cell, from its last save on."""
    target = work / f"runs-{updates}" / cell.name
    if finished(target):
        return
    target.parent.mkdir(exist_ok=True)
    way = dict(WAYS[cell.way.removesuffix(UNGUARDED)])
    options = {
        "source": work / f"model{'-hard' * cell.hard}-{cell.seed}",
        "data": work / "corpus",
        "target": target,
        "steps": updates,
        "sequence-length": size.sequence,
        "global-batch-size": size.batch,
        "learning-rate": 1e-3,
        "seed": cell.seed,
        "save-every": max(updates // 10, 1),
        "keep": 1,
        "log-every": max(updates // 10, 1),
        "validate-every": 0,
        "track": "none",
        "hang-timeout": 0,  # other work on the machine may hold an update up
        **way,
        # All layers: the hardest setting.
        **({"fp8-bf16-layers": "0,0"} if way["precision"] == "fp8" else {}),
    }
    pretrain("train", *(f"--{name}={value}" for name, value in options.items()), guard=UNGUARDED not in cell.way)


def figures(work: Path, updates: int, seeds: int) -> dict[str, Any]:
    """Of cells finished here: curve, mean loss over the last tenth, seconds per update, shares and fallbacks of FP8."""
    found = {}
    for cell in cells(seeds):
        target = work / f"runs-{updates}" / cell.name
        if not finished(target):
            continue
        lines = (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        last = rows[-max(updates // 10, 1) :]
        found[cell.name] = {
            "way": cell.way,
            "seed": cell.seed,
            "hard": cell.hard,
            "loss": round(statistics.mean(row["loss"] for row in last), 6),
            "seconds": round(statistics.median(row["seconds"] for row in rows), 3),
            "curve": [round(row["loss"], 4) for row in rows],
            "machine": processor(),
            **{
                name: max(row[f"fp8_{name}_{kind}"] for row in rows for kind in ("activations", "weights", "gradients"))
                for name in ("clipped", "underflow")
                if "fp8_fallbacks" in rows[-1]
            },
            **({"fallbacks": rows[-1]["fp8_fallbacks"]} if "fp8_fallbacks" in rows[-1] else {}),
        }
    return found


def differences(found: Mapping[str, Any], way: str, *, hard: bool) -> list[float]:
    """Relative differences of the mean loss from bf16, by seed: of seeds for which both are there."""
    losses = {(each["way"], each["seed"]): each["loss"] for each in found.values() if each["hard"] == hard}
    return [
        loss / losses["bf16", seed] - 1 for (of, seed), loss in losses.items() if of == way and ("bf16", seed) in losses
    ]


def floor(found: Mapping[str, Any]) -> list[float]:
    """Relative differences of bf16 seeds from each other."""
    losses = [each["loss"] for each in found.values() if each["way"] == "bf16" and not each["hard"]]
    return [abs(one / other - 1) for one, other in itertools.combinations(losses, 2)]


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text; the first are the titles."""
    rows = [["", "mean loss, last tenth", "against bf16", "goal", "clipped", "to zero", "fallbacks", "s per update"]]
    ways = [(way, False) for way in WAYS] + [(way, True) for way in HARD]
    for way, hard in ways:
        of_way = [each for each in found.values() if (each["way"], each["hard"]) == (way, hard)]
        if not of_way:
            continue
        apart = differences(found, way, hard=hard)
        worst = max(map(abs, apart), default=None)
        goal = None if hard else GOALS.get(way)
        rows.append(
            [
                f"{way}{', outlier channels' * hard}",
                " ".join(f"{each['loss']:.4f}" for each in of_way),
                " ".join(f"{each:+.2%}" for each in apart) if way != "bf16" else "",
                "" if goal is None or worst is None else f"{goal:.2%}, {'met' if worst < goal else 'missed'}",
                *(
                    f"{max(each[name] for each in of_way):.2%}" if name in of_way[0] else ""
                    for name in ("clipped", "underflow")
                ),
                str(max(each["fallbacks"] for each in of_way)) if "fallbacks" in of_way[0] else "",
                f"{statistics.median(each['seconds'] for each in of_way):.2f}",
            ]
        )
    if apart := floor(found):
        rows.append(["bf16, seeds against each other", "", " ".join(f"{each:.2%}" for each in apart), *[""] * 5])
    return rows


def page_of(found: Mapping[str, Any], described: Mapping[str, Any], updates: int) -> str:
    """The page: a picture of each case, and the table."""
    from shared.report import page
    from shared.report.charts import Line, chart, smoothed

    def picture(title: str, names: Sequence[str], hard: bool) -> str:
        lines = []
        for name, style in zip(names, page.STYLES, strict=False):
            of_way = [each["curve"] for each in found.values() if (each["way"], each["hard"]) == (name, hard)]
            means = [(step, statistics.mean(values)) for step, values in enumerate(zip(*of_way, strict=True), 1)]
            lines.append(Line(name=name, points=smoothed(means), style=style))
        return chart(title, lines)

    cells_of = [[f"<td>{escape(cell)}</td>" for cell in row] for row in table(found)]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells_of)
    shown = [
        picture("Loss, nats per token, mean of the seeds, smoothed", list(WAYS), hard=False),
        picture("The same with outlier channels", HARD, hard=True),
        f"<figure><figcaption><h2>Figures</h2></figcaption><table cellpadding=6>{body}</table></figure>",
    ]
    subtitle = ", ".join(f"{name} {value}" for name, value in described.items())
    return page.render(title=f"FP8 training, {updates} updates", subtitle=subtitle, tiles={}, figures=shown)


def recorded(file: Path, described: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Cells of an earlier record, maybe another machine's; none if it is of another text, model or length: said."""
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same = {"text", "parameters", "device"}
    apart = [name for name in sorted(same) if found["machine"].get(name) != described[name]]
    if found["updates"] != updates:
        apart.append("updates")
    if apart:
        print(f"{file} is of other {', '.join(apart)}: its cells are not used", flush=True)
        return {}
    return dict(found["cells"])


def shortened(content: str) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: re.sub(r"\s+", " ", found[0]), content) + "\n"


@cache
def processor() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return cpu[1].strip() if cpu else platform.processor()


def machine(work: Path, size: Size) -> dict[str, Any]:
    """What was trained, and on what."""
    import torch

    from shared.families import registry

    return {
        "device": torch.cuda.get_device_name() if torch_is_cuda() else "CPU",
        "text": hashlib.sha256((work / "text.jsonl").read_bytes()).hexdigest()[:16],
        "parameters": registry.from_config(size.config()).parameter_count(),
        **{name: metadata.version(name) for name in ("torch", "megatron-core")},
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="tokens, models and runs; a later run goes on there")
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="cells whose name has these words", default="")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    size, work = SIZES[given.size], given.work / given.size
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, size, given.seeds)
    described = machine(work, size)
    name = f"fp8-{given.size}-{re.sub(r'[^a-z0-9]+', '-', described['device'].lower())}"
    earlier = recorded(given.results / f"{name}.json", described, given.updates)
    todo = [cell for cell in cells(given.seeds) if given.only in cell.name]
    found = earlier | figures(work, given.updates, given.seeds)
    for index, cell in enumerate(todo, 1):
        print(f"cell {index} of {len(todo)}: {cell.name}", flush=True)
        if cell.name not in found:
            train(work, size, cell, given.updates)
        found = earlier | figures(work, given.updates, given.seeds)
        content = json.dumps({"machine": described, "updates": given.updates, "cells": found}, indent=1)
        (work / f"{name}.json").write_text(shortened(content), encoding="utf-8")
        (work / f"{name}.html").write_text(page_of(found, described, given.updates), encoding="utf-8")
        if given.record:
            given.results.mkdir(exist_ok=True)
            for kind in ("json", "html"):
                shutil.copyfile(work / f"{name}.{kind}", given.results / f"{name}.{kind}")
    for row in table(found):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
