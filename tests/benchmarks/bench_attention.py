"""Packed attention on this machine: segment by segment against a dense mask of whole rows, forward and backward, fp32.

    python tests/benchmarks/bench_attention.py [TOKENS ...]    # default 4096 16384 131072

8 query heads, 4 key/value heads, head_dim 64, one row of segments of about 500 tokens. Time is the median of 3, one thread.
Memory is the growth of the process's peak over the inputs; each measurement is a process of its own. Above 16384 tokens the
dense mask is not tried. Prints a Markdown table.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

DENSE_LIMIT = 16384


def measure(tokens: int, way: str) -> dict[str, float]:
    """Seconds and bytes of forward and backward passes."""
    import torch

    from shared.kernels.attention import masks, sdpa
    from shared.kernels.attention.segments import within_segments

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(250, 750, (tokens // 250,), generator=generator)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None, :tokens]
    shapes = (1, 8, tokens, 64), (1, 4, tokens, 64), (1, 4, tokens, 64)
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        began = time.perf_counter()
        if way == "dense":
            attended = sdpa.attend(*inputs, masks.dense(segments), scale=None)
        else:
            attended = within_segments(lambda q, k, v: sdpa.attend(q, k, v, None, scale=None), *inputs, segments)
        attended.sum().backward()
        seconds.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "bytes": (after - before) * 1024}


def main(sizes: list[int]) -> None:
    print(
        "| tokens | dense mask, s | by segments, s | ratio | dense mask, MiB | by segments, MiB |\n|---|---|---|---|---|---|"
    )
    for tokens in sizes:
        found = {}
        for way in ("segments", "dense") if tokens <= DENSE_LIMIT else ("segments",):
            words = [sys.executable, __file__, "--one", str(tokens), way]
            found[way] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        ours, dense = found["segments"], found.get("dense")
        cells = [f"{tokens:,}", f"{dense['seconds']:.2f}" if dense else "-", f"{ours['seconds']:.2f}"]
        cells += [f"{dense['seconds'] / ours['seconds']:.1f}" if dense else "-"]
        cells += [f"{dense['bytes'] / 2**20:,.0f}" if dense else "-", f"{ours['bytes'] / 2**20:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]), sys.argv[3])))
    else:
        main([int(word) for word in sys.argv[1:]] or [4096, 16384, 131072])
