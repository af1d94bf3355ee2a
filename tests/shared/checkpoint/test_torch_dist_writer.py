"""torch's own reader loads what is written here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from shared.checkpoint import torch_dist_writer
from shared.checkpoint.dtypes import BF16, FP32
from shared.checkpoint.files import hash_file
from shared.checkpoint.torch_dist_writer import TorchDistWriter


def write(folder: Path, tensor: torch.Tensor, norm: torch.Tensor) -> dict[str, str]:
    hashes: dict[str, str] = {}
    writer = TorchDistWriter(folder, hashes.__setitem__)
    writer.declare("w", BF16, tuple(tensor.shape))
    writer.declare("n", FP32, tuple(norm.shape))
    for layer, half in ((0, 0), (0, 3), (1, 0), (1, 3)):
        part = tensor[layer, half : half + 3].contiguous().view(torch.uint8).numpy()
        writer.chunk("w", (layer, half, 0), (1, 3, 4), [memoryview(part).cast("B")])
    writer.chunk("n", (0,), (5,), [memoryview(np.ascontiguousarray(norm.numpy())).cast("B")])
    writer.put_object("w._extra_state/shard_0_1", [None])
    writer.finish({"iteration": 0, "content_metadata": {"x": True}})
    return hashes


@pytest.mark.parametrize("file_bytes", [1 << 30, 1000])
def test_torch_distributed_checkpoint_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr(torch_dist_writer, "_FILE_BYTES", file_bytes)
    tensor, norm = torch.randn(2, 6, 4).to(torch.bfloat16), torch.randn(5)
    hashes = write(tmp_path, tensor, norm)
    assert set(hashes) == {path.name for path in tmp_path.glob("*.distcp")}
    assert (len(hashes) > 1) == (file_bytes == 1000)
    state = {"w": torch.full((2, 6, 4), torch.nan, dtype=torch.bfloat16), "n": torch.full((5,), torch.nan)}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(state["w"], tensor)
    assert torch.equal(state["n"], norm)
    for name, digest in hashes.items():
        assert hash_file(tmp_path / name) == digest


def test_files_that_make_it_a_megatron_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(2, 6, 4, dtype=torch.bfloat16), torch.zeros(5))
    assert json.loads((tmp_path / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert torch.load(tmp_path / "common.pt", weights_only=True)["content_metadata"] == {"x": True}


def test_chunk_of_too_few_bytes_is_a_defect(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path, lambda name, digest: None)
    writer.declare("n", FP32, (5,))
    with pytest.raises(AssertionError, match="16 bytes"):
        writer.chunk("n", (0,), (5,), [memoryview(bytes(16))])
