"""Memory of training all weights beside LoRA, in bytes: `make bench-lora`.

    python tests/benchmarks/bench_lora.py [--size llama-20m] [--rank 16] [--length 256] [--record]

One process makes an update of one sequence on one thread, in bf16 and in fp32, once with all weights and once with LoRA on every
linear layer of attention and MLP. Figures of one rank without other data-parallel ranks, after the update:

    trained     parameters
    weights     bytes of the model's parameters
    gradients   of the buffers of gradients, fp32
    optimizer   of AdamW's state, and the fp32 main weights in bf16
    checkpoint  bytes of the files of a saved iteration
    held        weights, gradients and optimizer

`--record` keeps them in `results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_train import RESULTS, Shape, machine, record_path  # noqa: E402

FIGURES = ("weights", "gradients", "optimizer", "checkpoint", "held")


def measure(size: str, rank: int, length: int) -> dict[str, dict[str, int]]:
    """Way of training -> figures."""
    import torch

    from shared.checkpoint.files import files_below
    from shared.families import registry
    from shared.mapping.adapters import ALL_LINEAR, LoraSettings
    from shared.runtime import process_groups
    from shared.training import state
    from shared.training.loop import forward_backward
    from shared.training.optimizer import build_optimizer, held_bytes, wrap
    from shared.training.trainable import FULL, Lora
    from tests.benchmarks.training_ways import Random, built, training_config

    torch.set_num_threads(1)
    architecture = registry.sizes()[size]
    shape = Shape(
        **{"layers": architecture.num_layers, "hidden": architecture.hidden_size, "ffn": 0, "heads": 0, "groups": 0},
        **{"vocab": architecture.vocab_size, "sequence": length, "micro": 1, "global_": 1},
    )
    settings = LoraSettings(rank=rank, alpha=2.0 * rank, targets=(ALL_LINEAR,))
    found: dict[str, dict[str, int]] = {}
    device = process_groups.initialize(training_config(shape).parallel, 1)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for name, lora in (("whole", None), ("LoRA", settings)):
            config = replace(training_config(shape), precision=precision, lora=lora)
            chunk = built(architecture, config, dtype)
            (Lora(lora, 1) if lora else FULL).apply([chunk])
            model = wrap([chunk], overlap=False)
            optimizer = build_optimizer(config, model)
            forward_backward(config, model, Random(shape), 0, device)
            optimizer.step()
            figures = held_bytes(model, optimizer)
            figures["held"] = sum(figures.values())
            figures["trained"] = sum(each.numel() for each in chunk.parameters() if each.requires_grad)
            with tempfile.TemporaryDirectory() as folder:
                state.save(Path(folder), model, optimizer, step=1)
                figures["checkpoint"] = sum(path.stat().st_size for path in files_below(Path(folder)))
            found[f"{precision}, {name}"] = figures
    process_groups.destroy()
    return found


def table(found: dict[str, dict[str, int]]) -> str:
    """Markdown, in MiB."""
    lines = [f"| | trained | {' | '.join(FIGURES)} |", "|---|---|" + "---|" * len(FIGURES)]
    for way, figures in found.items():
        cells = " | ".join(f"{figures[name] / (1 << 20):,.1f} MiB" for name in FIGURES)
        lines.append(f"| {way} | {figures['trained']:,} | {cells} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama-20m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    found = measure(given.size, given.rank, given.length)
    described = machine()
    print(f"{described}\n\n{table(found)}", flush=True)
    if given.record:
        content: dict[str, Any] = {"machine": described, "results": {f"{given.size}, rank {given.rank}": found}}
        path = record_path(described, given.results, of="lora")
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
