"""Experts of MoE on this machine: grouped GEMM against Megatron-Core's loop over experts: `make bench-experts`.

    python tests/benchmarks/bench_experts.py [--experts 8 64 128] [--rounds 15] [--record]

Forward and backward of 2,048 tokens, 4 experts a token, hidden size 256, expert size 128, gated; fp32 and bf16 (bf16 only on a
GPU). Every token's experts are drawn evenly. Time is the median of the rounds, after 3 that do not count, in turns: of the
processor, on one thread of a CPU; of the wall clock on a GPU. `--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from shared.families import registry
from shared.parallel import ParallelConfig
from shared.runtime.device import select_device

DEVICE = select_device()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402

from shared.model.backend import LOCAL  # noqa: E402
from shared.model.gpt import transformer_config  # noqa: E402
from shared.runtime.process_groups import initialize  # noqa: E402
from tests.benchmarks.bench_attention import record  # noqa: E402
from tests.benchmarks.bench_train import RESULTS, machine  # noqa: E402

TOKENS, TOP_K, HIDDEN, FFN = 2048, 4, 256, 128
WAYS = {"loop": SequentialMLP.forward, "grouped": lambda experts, *given: experts(*given)}


WARM_UP = 3  # rounds


def measure(number: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds by way."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    torch.manual_seed(1)
    architecture = registry.sizes()["qwen3-moe-tiny"].with_values(
        hidden_size=HIDDEN, moe={"experts": number, "top_k": TOP_K}
    )
    config = transformer_config(
        architecture, ParallelConfig(), dtype, perform_initialization=True, moe_ffn_hidden_size=FFN
    )
    submodules = MLPSubmodules(LOCAL.column_parallel_linear(0, expert=True), LOCAL.row_parallel_linear(0, expert=True))
    build = LOCAL.grouped_mlp_modules(submodules)
    experts = build(number, config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).to(DEVICE)
    rows = TOKENS * TOP_K
    counts = torch.bincount(torch.randint(number, (rows,)), minlength=number)
    x = torch.randn(rows, HIDDEN, device=DEVICE).to(dtype).requires_grad_()
    probs, gradient = torch.rand(rows, device=DEVICE), torch.randn(rows, HIDDEN, device=DEVICE).to(dtype)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(WARM_UP + rounds):
        for way, forward in WAYS.items():
            experts.zero_grad()
            began = clock()
            forward(experts, x, counts, probs)[0].backward(gradient)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                seconds[way].append(clock() - began)
    return {way: round(statistics.median(each), 6) for way, each in seconds.items()}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = ["| experts, precision | loop, ms | grouped, ms | loop / grouped |", "|---|---|---|---|"]
    for name, each in found.items():
        loop, grouped = each["loop"], each["grouped"]
        lines.append(f"| {name} | {loop * 1e3:.1f} | {grouped * 1e3:.1f} | {loop / grouped:.2f} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    initialize(ParallelConfig(), 1)
    dtypes = (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)
    found = {
        f"{number}, {str(dtype).removeprefix('torch.')}": measure(number, dtype, given.rounds)
        for number in given.experts
        for dtype in dtypes
    }
    described = machine("torch", "megatron-core")
    print(f"{described}\n\n{table(found)}", flush=True)
    if given.record:
        record(found, described, given.results, of="experts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
