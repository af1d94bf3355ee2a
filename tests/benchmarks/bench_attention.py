"""Attention on this machine: `segments` against `eager` (scores of whole rows), forward and backward: `make bench-attention`.

    python tests/benchmarks/bench_attention.py [--tokens 4096 16384 131072] [--record]

8 query heads, 4 key/value heads, head_dim 64, fp32, one row: packed of segments of about 500 tokens, also with sinks or ALiBi; or
one segment with a window of 1024 keys. One thread. Time is that of the processor, the median of 3. Memory is the growth of the
process's peak; each measurement is a process of its own. Above 4096 tokens eager is not tried.

Memory of `segments` is linear in the tokens: bytes per token at the most tokens are at most 10% more than at those before, else
the exit code is 1. `--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.bench_train import RESULTS, machine, record_path

EAGER_LIMIT = 4096
HEADS = 8
ROWS = ("packed", "packed, sinks", "packed, ALiBi", "window")
ALLOWED = 1.1  # bytes per token, of those at fewer tokens
Found = dict[str, dict[str, dict[str, dict[str, float]]]]  # row -> tokens -> back end -> figures


def measure(tokens: int, row: str, name: str) -> dict[str, float]:
    """Seconds and bytes of forward and backward passes."""
    import torch

    from shared.kernels.attention import alibi
    from shared.kernels.attention.choose import BACK_ENDS
    from shared.kernels.attention.needs import Call, Features
    from shared.report.metrics import peak_resident

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(250, 750, (max(tokens // 250, 1),), generator=generator)
    packed = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None, :tokens]
    shapes = (1, HEADS, tokens, 64), (1, 4, tokens, 64), (1, 4, tokens, 64)
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    features = Features(
        window=1024 if row == "window" else None,
        sinks_H=torch.zeros(HEADS) if row == "packed, sinks" else None,
        slopes_H=alibi.slopes(HEADS) if row == "packed, ALiBi" else None,
    )
    before, seconds = peak_resident(), []
    for _ in range(3):
        began = time.process_time()
        segments = None if row == "window" else packed
        call = Call(q_BHQD=inputs[0], k_BGKD=inputs[1], v_BGKV=inputs[2], segments=segments, features=features)
        BACK_ENDS[name].attend(call).sum().backward()
        seconds.append(time.process_time() - began)
    return {"seconds": round(statistics.median(seconds), 4), "bytes": peak_resident() - before}


def measured(tokens: Sequence[int]) -> Found:
    """Each measurement by a process of its own."""
    found: Found = {}
    for row in ROWS:
        for number in tokens:
            names = ("segments", "eager") if number <= EAGER_LIMIT else ("segments",)
            for name in names:
                words = [sys.executable, __file__, "--one", str(number), row, name]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found.setdefault(row, {}).setdefault(str(number), {})[name] = json.loads(done.stdout)
    return found


def table(found: Found) -> str:
    """Markdown."""
    lines = ["| row | tokens | eager, s | segments, s | eager, MiB | segments, MiB |", "|---|---|---|---|---|---|"]
    for row, of_tokens in found.items():
        for tokens, ways in of_tokens.items():
            ours, eager = ways["segments"], ways.get("eager")
            cells = [row, f"{int(tokens):,}", f"{eager['seconds']:.2f}" if eager else "-", f"{ours['seconds']:.2f}"]
            cells += [f"{eager['bytes'] / 2**20:,.0f}" if eager else "-", f"{ours['bytes'] / 2**20:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def more_than_linear(found: Found) -> list[str]:
    """Rows whose memory grows faster than their tokens, from the last size but one to the last."""
    marks = []
    for row, of_tokens in found.items():
        each = sorted((int(tokens), ways["segments"]["bytes"] / int(tokens)) for tokens, ways in of_tokens.items())[-2:]
        if len(each) == 2 and each[1][1] > ALLOWED * each[0][1]:
            marks.append(
                f"{row}: {each[1][1]:,.0f} bytes a token at {each[1][0]:,}, {each[0][1]:,.0f} at {each[0][0]:,}"
            )
    return marks


def record(found: Mapping[str, Any], described: Mapping[str, Any], results: Path, *, of: str) -> None:
    results.mkdir(exist_ok=True)
    path = record_path(described, results, of=of)
    path.write_text(json.dumps({"machine": described, "results": found}, indent=1) + "\n", encoding="utf-8")
    print(f"recorded in {path}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 131072])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # tokens, row and back end of a measurement
    given = parser.parse_args(words)
    if given.one:
        print(json.dumps(measure(int(given.one[0]), *given.one[1:])))
        return 0
    found = measured(given.tokens)
    described = machine("torch")
    print(f"{described}\n\n{table(found)}", flush=True)
    if given.record:
        record(found, described, given.results, of="attention")
    marks = more_than_linear(found)
    for mark in marks:
        print(f"MORE THAN LINEAR {mark}")
    return 1 if marks else 0


if __name__ == "__main__":
    raise SystemExit(main())
