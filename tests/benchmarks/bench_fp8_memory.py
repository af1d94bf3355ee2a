"""Bytes that a layer keeps for the backward pass, in bf16 and in each FP8 recipe: `make bench-fp8-memory`; on any machine.

    python tests/benchmarks/bench_fp8_memory.py [--hidden 256] [--tokens 128]

Of a decoder layer of Qwen3's kind with an ffn of 3 times hidden: every tensor that autograd saves in the forward pass of a model
of two layers, less those of one layer; storages once, weights not. Bytes per token grow with hidden, so that the ratio is that of
larger models, but for the scales of rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shared.runtime.silence_warnings import silence  # noqa: E402

silence()

import torch  # noqa: E402

from shared.families import registry  # noqa: E402
from shared.kernels.fp8.recipes import Fp8Recipe  # noqa: E402
from shared.model import gpt  # noqa: E402
from shared.model.backend import LocalBackend  # noqa: E402
from shared.model.fp8_backend import Fp8Backend  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime import process_groups  # noqa: E402

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")


def kept(hidden: int, layers: int, tokens: int, recipe: str | None) -> int:
    """Bytes saved for the backward pass in one forward pass. `recipe`: None for bf16."""
    heads = max(hidden // 64, 1)
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "head_dim": 64,
        "vocab_size": 256,
        "max_position_embeddings": tokens,
        "rms_norm_eps": 1e-6,
    }
    backend = LocalBackend()
    if recipe:
        fields = {"format": "e4m3", "amax_history": 16, "power_of_two_scales": True, "bf16_layers": (0, 0)}
        backend = Fp8Backend(backend, Fp8Recipe(name=recipe, **fields), layers)
    process_groups.initialize(ParallelConfig(), 1)
    (model,) = gpt.build(
        registry.from_config(config),
        ParallelConfig(),
        dtype=torch.bfloat16,
        perform_initialization=True,
        backend=backend,
    )
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            saved[place] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    positions = torch.arange(tokens, device=ids.device)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, position_ids=positions, attention_mask=None, labels=ids)
    found = sum(each.untyped_storage().nbytes() for each in saved.values())
    del loss
    return found


def table(hidden: int, tokens: int) -> list[list[str]]:
    """Rows of text; the first has the titles."""
    rows = [["", "bytes per token and layer", "of hidden", "beside bf16"]]
    plain = None
    for recipe in (None, *RECIPES):
        layer = (kept(hidden, 2, tokens, recipe) - kept(hidden, 1, tokens, recipe)) / tokens
        plain = layer if plain is None else plain
        rows.append([recipe or "bf16", f"{layer:,.0f}", f"{layer / hidden:.1f}", f"{layer / plain:.1%}"])
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args(words)
    for row in table(given.hidden, given.tokens):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
