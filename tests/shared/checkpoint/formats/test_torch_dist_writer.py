"""Written directories, loaded by torch.distributed.checkpoint."""

from __future__ import annotations

import io
import json
import re
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shared.checkpoint.copy import blocks
from shared.checkpoint.copy.operations import WriteBytes
from shared.checkpoint.copy.worker_pool import write_files
from shared.checkpoint.dtypes import BF16, FP32
from shared.checkpoint.files import hash_file
from shared.checkpoint.formats import torch_dist_writer
from shared.checkpoint.formats.torch_dist_writer import TorchDistLayout


def write(folder: Path, tensor: torch.Tensor, norm: torch.Tensor) -> dict[str, str]:
    layout = TorchDistLayout()
    layout.declare("w", BF16, tuple(tensor.shape))
    layout.declare("n", FP32, tuple(norm.shape))
    for layer, half in ((0, 0), (0, 3), (1, 0), (1, 3)):
        part = tensor[layer, half : half + 3].contiguous().view(torch.uint8).numpy().tobytes()
        pieces = [WriteBytes(part[start : start + 8]) for start in range(0, len(part), 8)]
        layout.add_chunk("w", (layer, half, 0), (1, 3, 4), partial(list, pieces))
    layout.add_chunk("n", (0,), (5,), lambda: [WriteBytes(norm.numpy().tobytes())])
    layout.add_objects(["w._extra_state/shard_0_1"], [None])
    layout.finish(folder, {"iteration": 0, "content_metadata": {"x": True}})
    return write_files(folder, layout.files(), workers=2)


@pytest.mark.parametrize("block", [blocks.BLOCK, 16])
@pytest.mark.parametrize("file_bytes", [1 << 30, 1000])
def test_torch_distributed_checkpoint_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, block: int
) -> None:
    monkeypatch.setattr(torch_dist_writer, "_SMALLEST", file_bytes)
    monkeypatch.setattr(blocks, "BLOCK", block)  # archives larger than it are written in several blocks
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
    for name in hashes:  # every archive is a zip that any program accepts: its checksums are right
        content = (tmp_path / name).read_bytes()
        ends = [found.end() + 18 for found in re.finditer(b"PK\x05\x06", content)]
        for start, end in pairwise([0, *ends]):
            assert zipfile.ZipFile(io.BytesIO(content[start:end])).testzip() is None


def test_files_that_make_it_a_megatron_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(2, 6, 4, dtype=torch.bfloat16), torch.zeros(5))
    assert json.loads((tmp_path / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert torch.load(tmp_path / "common.pt", weights_only=True)["content_metadata"] == {"x": True}


@pytest.mark.parametrize("block", [blocks.BLOCK, 16])
def test_chunk_of_too_few_bytes_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    layout = TorchDistLayout()
    layout.declare("n", FP32, (5,))
    layout.add_chunk("n", (0,), (5,), lambda: [WriteBytes(bytes(16))])
    with pytest.raises(AssertionError, match="bytes"):
        write_files(tmp_path, layout.files(), workers=1)
