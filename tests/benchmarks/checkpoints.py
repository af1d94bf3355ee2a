"""Checkpoints with real shapes and generated weights, written at disk speed in little memory."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.architecture.architecture import MLP, Architecture
from shared.checkpoint.formats.hugging_face import default_layout, write_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.families import registry

_LLAMA_1B = registry.sizes()["llama-3.2-1b"]
_QWEN3_MOE = registry.sizes()["qwen3-30b-a3b"]
SHAPES: dict[str, Architecture] = {
    "tiny": registry.sizes()["tiny"],
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.2-3b": _LLAMA_1B.with_values(
        num_layers=28, hidden_size=3072, attention={"heads": 24, "groups": 8, "head_dim": 128}
    ),
    "qwen3-moe-2b": _QWEN3_MOE.with_values(
        num_layers=20,
        hidden_size=1024,
        attention={"heads": 16},
        moe={"experts": 64, "expert": MLP(ffn_hidden_size=448)},
    ),
    "gpt-oss-20b": registry.sizes()["gpt-oss-20b"],
}
ASKED_FOR = ("tiny", "gpt-oss-20b")  # measured only where `--shapes` names it: for tests, and 42 GB
_POOL = 32 << 20  # bytes of random bf16 numbers, of which every tensor takes another stretch


def generate(path: Path, architecture: Architecture) -> int:
    """A Hugging Face directory in bf16, in transformers' default shards; returns the bytes of its weights."""
    path.mkdir(parents=True)
    sources = [source for entry in registry.table_of(architecture).entries() for source in entry.sources]
    layout = default_layout(sorted((source.name, "BF16", source.shape) for source in sources))
    numbers = np.random.default_rng(0).standard_normal(_POOL // 2, dtype=np.float32) * np.float32(0.02)
    pool = memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16)).cast("B")

    def blocks(tensor: TensorInfo) -> Iterator[memoryview]:
        start, left = zlib.crc32(tensor.name.encode()) % (_POOL // 4) * 2, tensor.size
        while left:
            block = pool[start : start + left]
            yield block
            start, left = 0, left - len(block)

    write_weights(path, layout, blocks, lambda name, digest: None)
    config = registry.to_config(architecture, torch_dtype="bfloat16")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.size for tensor in layout.tensors().values())


if __name__ == "__main__":
    generate(Path(sys.argv[2]), SHAPES[sys.argv[1]])
