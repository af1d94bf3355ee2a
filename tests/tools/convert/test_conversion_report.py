"""A conversion stays within the logged memory, also for a checkpoint of twenty times that size."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.architecture.architecture import MLP, Architecture
from shared.checkpoint.files import hash_file
from shared.checkpoint.formats.hugging_face import default_layout, write_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.families import registry

RUN = """
import sys
from pathlib import Path
from tools.convert.cli import tool
try:
    tool.run(sys.argv[1:])
finally:
    print(Path("/proc/self/status").read_text())
"""
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def large(path: Path, architecture: Architecture, fp8: bool) -> int:
    """A checkpoint whose bytes all differ from zero, written at the speed of the disk; returns its size."""
    path.mkdir()
    sources = [source for entry in registry.table_of(architecture).entries() for source in entry.sources]
    triples = [(source.name, "BF16", source.shape) for source in sources]
    if fp8:
        coded = [(name, shape) for name, _, shape in triples if name.endswith("_proj.weight")]
        triples = [(name, "F8_E4M3" if name.endswith("_proj.weight") else kind, shape) for name, kind, shape in triples]
        triples += [(f"{name}_scale_inv", "F32", tuple(-(-size // 128) for size in shape)) for name, shape in coded]
    layout = default_layout(triples, file="model.safetensors")
    pattern = memoryview(np.random.default_rng(0).integers(1, 256, 1_000_003, dtype=np.uint8)).cast("B")

    def blocks(tensor: TensorInfo) -> list[memoryview]:
        if tensor.name.endswith("_scale_inv"):
            return [memoryview(np.full(tensor.shape, 0.003, dtype=np.float32)).cast("B")]
        left = tensor.size
        return [pattern[: min(len(pattern), left - start)] for start in range(0, left, len(pattern))]

    write_weights(path, layout, blocks, lambda name, digest: None)
    config = registry.to_config(architecture, torch_dtype="bfloat16")
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    return (path / "model.safetensors").stat().st_size


def converted(limit: int, *words: str | Path) -> tuple[int, int]:
    """Run the command under a limit of memory; what its plan stated, and the most that it had, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    stated = re.search(r"at most ([\d.]+) (\w+) of memory", done.stderr)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert stated is not None
    assert peak is not None
    return int(float(stated[1]) * _UNITS[stated[2]]), int(peak[1]) << 10


Both = Callable[..., int]


@pytest.fixture
def both_ways(tmp_path: Path) -> Both:
    def convert(architecture: Architecture, limit: int, fp8: bool = False) -> int:
        size = large(tmp_path / "hf", architecture, fp8)
        wanted = hash_file(tmp_path / "hf" / "model.safetensors")
        for command, source, target in (("to-megatron", "hf", "megatron"), ("to-hf", "megatron", "back")):
            words = (command, "--source", tmp_path / source, "--target", tmp_path / target, "--workers", "2")
            more = ("--quantized",) if fp8 and command == "to-hf" else ()
            stated, peak = converted(limit, *words, *more)
            assert peak <= stated
            for file in (tmp_path / source).rglob("*.*t*"):  # the disk may be small
                if file.suffix in (".safetensors", ".distcp"):
                    file.unlink()
        assert hash_file(tmp_path / "back" / "model.safetensors") == wanted
        return size

    return convert


def test_a_checkpoint_of_twenty_times_the_limit(both_ways: Both) -> None:
    """RLIMIT_DATA: the heap, the stacks and every other private page that can be written. The limit is real."""
    limit = 44 << 20
    tiny = registry.sizes()["tiny"]
    architecture = tiny.with_values(hidden_size=2048, mlp={"ffn_hidden_size": 11_000}, num_layers=6, vocab_size=16_000)
    assert both_ways(architecture, limit) > 20 * limit


def test_many_small_tensors(both_ways: Both) -> None:
    """What is known of 20,000 tensors takes more memory than the blocks that are copied."""
    moe = {"experts": 256, "top_k": 2, "expert": MLP(ffn_hidden_size=8)}
    both_ways(registry.sizes()["qwen3-moe-tiny"].with_values(hidden_size=16, num_layers=26, moe=moe), 1 << 30)


def test_transposed_tensors_larger_than_the_limit(both_ways: Both) -> None:
    """They are turned strip by strip; 134 MB each, and numpy takes much of the limit."""
    limit = 120 << 20
    architecture = registry.sizes()["gpt2-tiny"].with_values(
        hidden_size=4096,
        mlp={"ffn_hidden_size": 16_384},
        attention={"heads": 32, "groups": 32, "head_dim": 128},
        num_layers=1,
        vocab_size=1024,
    )
    both_ways(architecture, limit)
    assert limit < 4096 * 16_384 * 2


def test_quantized_tensors_larger_than_the_limit(both_ways: Both) -> None:
    """Numbers are made of codes window by window, and codes of numbers band by band; 134 MB of numbers each."""
    limit = 120 << 20
    architecture = registry.sizes()["tiny"].with_values(
        hidden_size=2048,
        mlp={"ffn_hidden_size": 32_768},
        attention={"heads": 16, "groups": 2, "head_dim": 128},
        num_layers=1,
        vocab_size=1024,
    )
    both_ways(architecture, limit, fp8=True)
    assert limit < 2048 * 32_768 * 2
