"""Rows of tensors in any chunking, and incomplete directories."""

from __future__ import annotations

import io
import pickle
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from shared.checkpoint.copy.operations import WriteBytes
from shared.checkpoint.copy.worker_pool import write_files
from shared.checkpoint.dtypes import FP32
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.checkpoint.formats.torch_dist_writer import TorchDistLayout
from shared.errors import UserError

WHOLE = np.arange(2 * 12 * 6, dtype=np.float32).reshape(2, 12, 6)
Chunk = tuple[tuple[int, ...], tuple[int, ...]]


def chunks_at(*cuts: list[int]) -> list[Chunk]:
    """Every chunk of a grid with these edges."""
    ranges = [list(pairwise(edges)) for edges in cuts]
    return [
        (tuple(start for start, _ in chunk), tuple(stop - start for start, stop in chunk)) for chunk in product(*ranges)
    ]


def write(folder: Path, chunks: list[Chunk], key: str = "w") -> Path:
    folder.mkdir()
    layout = TorchDistLayout()
    layout.declare(key, FP32, WHOLE.shape)
    for offsets, sizes in chunks:
        part = WHOLE[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        layout.add_chunk(key, offsets, sizes, partial(list, [WriteBytes(part.tobytes())]))
    layout.add_objects(["w._extra_state/shard_0_1"], [None])
    layout.finish(folder, {"iteration": 3})
    write_files(folder, layout.files(), workers=1)
    return folder


CHUNKINGS = {
    "one": chunks_at([0, 2], [0, 12], [0, 6]),
    "layers": chunks_at([0, 1, 2], [0, 12], [0, 6]),
    "rows": chunks_at([0, 1, 2], [0, 3, 12], [0, 6]),
    "columns": chunks_at([0, 1, 2], [0, 12], [0, 2, 6]),
    "columns over layers": chunks_at([0, 2], [0, 12], [0, 3, 6]),
    "grid": chunks_at([0, 1, 2], [0, 5, 7, 12], [0, 1, 6]),
    "mixed": [*chunks_at([0, 1], [0, 12], [0, 3, 6]), *chunks_at([1, 2], [0, 4, 12], [0, 6])],
    "backwards": chunks_at([0, 1, 2], [0, 3, 12], [0, 2, 6])[::-1],
}


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_every_window_of_rows(tmp_path: Path, chunking: str) -> None:
    reader = TorchDistReader(write(tmp_path / "d", CHUNKINGS[chunking]))
    assert reader.tensors["w"].shape == WHOLE.shape
    for layer, first in product(range(2), range(12)):
        for count in range(1, 13 - first):
            found = b"".join(map(bytes, reader.rows("w", (layer,), first, count)))
            assert found == WHOLE[layer, first : first + count].tobytes()


def test_complete_tensor_along_its_first_axis(tmp_path: Path) -> None:
    reader = TorchDistReader(write(tmp_path / "d", CHUNKINGS["layers"]))
    assert b"".join(map(bytes, reader.rows("w", (), 0, 2))) == WHOLE.tobytes()


def test_objects_and_common_values(tmp_path: Path) -> None:
    reader = TorchDistReader(write(tmp_path / "d", CHUNKINGS["one"]))
    assert reader.objects == {"w._extra_state/shard_0_1"}
    assert reader.common() == {"iteration": 3}


def test_fp8_states_that_are_not_empty_are_named(tmp_path: Path) -> None:
    """As Megatron-Core saves them: archives of torch.save of None, tensors, or buffers with a pickle; read without unpickling."""
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Planner(DefaultSavePlanner):
        """Archives are written as they are, as by Megatron-Core's planner."""

        def transform_object(self, write_item, object):
            return object

    states = {
        "none": None,
        "empty": torch.empty(0, dtype=torch.uint8),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "numbers": torch.ones(10),
        "buffer": io.BytesIO(bytes(2000)),
    }
    content = {}
    for name, state in states.items():
        content[f"layers.{name}._extra_state/shard_0_1"] = archive = io.BytesIO()
        torch.save(state, archive)
    content["other/shard_0_1"] = content["layers.bytes._extra_state/shard_0_1"]
    save(content, storage_writer=FileSystemWriter(tmp_path / "d"), planner=Planner(), no_dist=True)
    found = TorchDistReader(tmp_path / "d").fp8_states()
    assert found == [f"layers.{name}._extra_state/shard_0_1" for name in ("buffer", "bytes", "numbers")]
    assert TorchDistReader(write(tmp_path / "written", CHUNKINGS["one"])).fp8_states() == []


def test_optimizer_state_is_set_apart(tmp_path: Path) -> None:
    reader = TorchDistReader(write(tmp_path / "d", CHUNKINGS["one"], key="optimizer.state.exp_avg.w"))
    assert reader.tensors == {}
    assert reader.non_weights == {"optimizer.state.exp_avg.w": "float32"}


def test_missing_rank(tmp_path: Path) -> None:
    """Chunks that do not cover their tensor."""
    folder = write(tmp_path / "d", CHUNKINGS["rows"][:-1])
    with pytest.raises(UserError, match="the chunks of w hold 90 of 144 elements"):
        TorchDistReader(folder)


def test_missing_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", CHUNKINGS["one"])
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp is missing, though .metadata names it"):
        TorchDistReader(folder)


def test_truncated_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", CHUNKINGS["one"])
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"__0_0.distcp is truncated"):
        TorchDistReader(folder)


def test_chunk_that_is_not_what_the_metadata_says(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "d", CHUNKINGS["rows"]), write(tmp_path / "e", CHUNKINGS["columns"])
    (folder / ".metadata").write_bytes((other / ".metadata").read_bytes())
    with pytest.raises(UserError, match="damaged|no tensor"):
        list(TorchDistReader(folder).rows("w", (0,), 0, 12))


def test_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.metadata is missing"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1})])
def test_metadata_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata"):
        TorchDistReader(tmp_path)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_malicious_metadata_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", CHUNKINGS["one"])
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "proof")))
    with pytest.raises(UserError, match="builtins.exec"):
        TorchDistReader(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_the_halves_of_a_gated_fc1_are_one_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As with Megatron-Core's `singleton_local_shards`; each half is split over two tensor-parallel ranks."""
    whole = np.arange(2 * np.prod(shape), dtype=np.float32).reshape(12, *shape[1:])
    layout = TorchDistLayout()
    for suffix, half in (("_w", whole[:6]), ("_v", whole[6:])):
        layout.declare(f"fc1.weight{suffix}", FP32, shape)
        for first in (0, 3):
            part = half[first : first + 3]
            offsets = (first, *(0 for _ in shape[1:]))
            layout.add_chunk(f"fc1.weight{suffix}", offsets, part.shape, partial(list, [WriteBytes(part.tobytes())]))
    layout.declare("lone_w", FP32, (1,))
    layout.add_chunk("lone_w", (0,), (1,), partial(list, [WriteBytes(bytes(4))]))
    layout.finish(tmp_path, {"iteration": 3})
    write_files(tmp_path, layout.files(), workers=1)
    reader = TorchDistReader(tmp_path)
    assert {key: tensor.shape for key, tensor in reader.tensors.items()} == {
        "fc1.weight": whole.shape,
        "lone_w": (1,),
    }
    for first, count in ((0, 12), (2, 3), (5, 4), (7, 5)):
        assert b"".join(reader.rows("fc1.weight", (), first, count)) == whole[first : first + count].tobytes()
