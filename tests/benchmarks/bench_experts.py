"""Experts of MoE on this machine: grouped GEMM against Megatron-Core's loop over experts, forward and backward.

    python tests/benchmarks/bench_experts.py [EXPERTS ...]    # default 8 64 128

2,048 tokens, 4 experts a token, hidden size 256, expert size 128, gated; fp32 and bf16 (bf16 only on a GPU). Every token's
experts are drawn evenly. Time is the median of 15 after 3, in turns; one thread on a CPU. Prints a Markdown table.
"""

from __future__ import annotations

import statistics
import sys
import time
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

TOKENS, TOP_K, HIDDEN, FFN = 2048, 4, 256, 128
WAYS = {"loop": SequentialMLP.forward, "grouped": lambda experts, *given: experts(*given)}


def measure(number: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds by way."""
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
    for turn in range(18):
        for way, forward in WAYS.items():
            experts.zero_grad()
            began = time.perf_counter()
            forward(experts, x, counts, probs)[0].backward(gradient)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                seconds[way].append(time.perf_counter() - began)
    return {way: statistics.median(each) for way, each in seconds.items()}


def main(numbers: list[int]) -> None:
    torch.set_num_threads(1)
    initialize(ParallelConfig(), 1)
    print("| experts | precision | loop, ms | grouped, ms | ratio |\n|---|---|---|---|---|")
    for number in numbers:
        for dtype in (torch.bfloat16,) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16):
            found = measure(number, dtype)
            cells = [str(number), str(dtype).removeprefix("torch.")]
            cells += [f"{found[way] * 1e3:.1f}" for way in WAYS]
            print(f"| {' | '.join(cells)} | {found['loop'] / found['grouped']:.2f} |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [8, 64, 128])
