"""Attention on this machine: `segments` against `eager` (scores of whole rows), forward and backward, fp32.

    python tests/benchmarks/bench_attention.py [TOKENS ...]    # default 4096 16384 131072

8 query heads, 4 key/value heads, head_dim 64, one row: packed of segments of about 500 tokens, also with sinks or ALiBi; or
one segment with a window of 1024 keys. Time is the median of 3, one thread. Memory is the growth of the process's peak;
each measurement is a process of its own. Above 4096 tokens eager is not tried. Prints a Markdown table.
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

EAGER_LIMIT = 4096
HEADS = 8
ROWS = ("packed", "packed, sinks", "packed, ALiBi", "window")


def measure(tokens: int, row: str, name: str) -> dict[str, float]:
    """Seconds and bytes of forward and backward passes."""
    import torch

    from shared.kernels.attention import alibi
    from shared.kernels.attention.choose import BACK_ENDS
    from shared.kernels.attention.needs import Call, Features

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(250, 750, (tokens // 250,), generator=generator)
    packed = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None, :tokens]
    shapes = (1, HEADS, tokens, 64), (1, 4, tokens, 64), (1, 4, tokens, 64)
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    features = Features(
        window=1024 if row == "window" else None,
        sinks_H=torch.zeros(HEADS) if row == "packed, sinks" else None,
        slopes_H=alibi.slopes(HEADS) if row == "packed, ALiBi" else None,
    )
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        began = time.perf_counter()
        segments = None if row == "window" else packed
        call = Call(q_BHQD=inputs[0], k_BGKD=inputs[1], v_BGKV=inputs[2], segments=segments, features=features)
        BACK_ENDS[name].attend(call).sum().backward()
        seconds.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "bytes": (after - before) * 1024}


def main(sizes: list[int]) -> None:
    print(
        "| row | tokens | eager, s | segments, s | ratio | eager, MiB | segments, MiB |\n|---|---|---|---|---|---|---|"
    )
    for row in ROWS:
        for tokens in sizes:
            found = {}
            for name in ("segments", "eager") if tokens <= EAGER_LIMIT else ("segments",):
                words = [sys.executable, __file__, "--one", str(tokens), row, name]
                found[name] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            ours, eager = found["segments"], found.get("eager")
            cells = [row, f"{tokens:,}", f"{eager['seconds']:.2f}" if eager else "-", f"{ours['seconds']:.2f}"]
            cells += [f"{eager['seconds'] / ours['seconds']:.1f}" if eager else "-"]
            cells += [f"{eager['bytes'] / 2**20:,.0f}" if eager else "-", f"{ours['bytes'] / 2**20:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]), sys.argv[3], sys.argv[4])))
    else:
        main([int(word) for word in sys.argv[1:]] or [4096, 16384, 131072])
