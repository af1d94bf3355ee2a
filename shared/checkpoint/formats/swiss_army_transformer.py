"""SwissArmyTransformer checkpoints (GLM-130B): one torch.save file per tensor-parallel rank, joined on read.

`latest` names the iteration; `<iteration>/mp_rank_XX_model_states.pt` holds a rank's state dict under `module`. Join of
the ranks' parts r0, r1, ... as in `convert_tp.py` of GLM-130B's repository (`;` joins rows):

    query_key_value, word_embeddings    column-parallel: `[r0 ; r1 ; ...]`
    dense_h_to_4h                       column-parallel GLU, halves x1 and x2: `[r0.x1 ; r1.x1 ; ... ; r0.x2 ; r1.x2 ; ...]`
    dense, dense_4h_to_h                row-parallel: columns side by side
    their biases, norms, constants      replicated: rank 0's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import Extent, ExtentView
from shared.checkpoint.formats.hugging_face import HfReader, default_layout
from shared.checkpoint.formats.pytorch_bin import TorchFile
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.mapping.layout import Shape
from shared.quantized.stored_weight import Weight

LATEST = "latest"
SETTINGS = "model_config.json"  # written by SwissArmyTransformer; GLM-130B was published without it
_RANK = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")
_COLUMN_PARALLEL = ("attention.query_key_value.weight", "attention.query_key_value.bias", "word_embeddings.weight")
_COLUMN_PARALLEL_GLU = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")
_ROW_PARALLEL = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


@dataclass(frozen=True, kw_only=True)
class JoinedTensor:
    """A tensor of the model, joined from its ranks."""

    tensor: TensorInfo  # file and start are rank 0's
    view: ExtentView


def rank_states(directory: Path) -> list[Path]:
    """The per-rank files of the iteration named in `latest`; none if the directory is no such checkpoint."""
    if not (directory / LATEST).is_file():
        return []
    name = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("global_step"):  # DeepSpeed's own tags
        return []
    return sorted(path for path in (directory / name).glob("mp_rank_*") if _RANK.fullmatch(path.name))


def join_ranks(files: Sequence[Path]) -> dict[str, JoinedTensor]:
    """The joined tensors, in the order of rank 0's file.

    Raises:
        UserError: a rank is missing, or its tensors differ from rank 0's; a file is damaged or quantised.
    """
    ranks = [_read(path) for path in files]
    numbers = [int(match[1]) for path in files if (match := _RANK.fullmatch(path.name))]
    count = max(_count(ranks[0]), numbers[-1] + 1)
    for number in range(count):
        if number not in numbers:
            raise UserError(
                f"{files[0].with_name(f'mp_rank_{number:02d}_model_states.pt')} is missing: the checkpoint has {count} "
                "tensor-parallel ranks; fetch it again"
            )
    first = ranks[0]
    for path, rank in zip(files[1:], ranks[1:], strict=True):
        if differing := sorted(first.keys() ^ rank.keys()):
            where, other = (path, files[0]) if differing[0] in rank else (files[0], path)
            raise UserError(f"{where} holds {differing[0]} and {other.name} does not; fetch both again")
        for name, tensor in rank.items():
            if (tensor.dtype, tensor.shape) != (first[name].dtype, first[name].shape):
                raise UserError(
                    f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, in {files[0].name} "
                    f"{first[name].dtype}{list(first[name].shape)}; fetch both again"
                )
    return {name: _join([rank[name] for rank in ranks]) for name in first}


def _read(path: Path) -> dict[str, TensorInfo]:
    file = TorchFile(path, training=True)
    module = file.content.get("module") if isinstance(file.content, Mapping) else None
    if not isinstance(module, Mapping) or not module:
        raise UserError(f"{path} has no tensors under `module`: not a SwissArmyTransformer checkpoint")
    with OpenFiles() as files:
        tensors = {str(name): file.tensor(str(name), value, files) for name, value in module.items()}
    for name, tensor in tensors.items():
        if tensor.dtype in ("I8", "U8"):
            raise UserError(f"{path}: {name} is quantised ({tensor.dtype}); fetch the unquantised model")
    return tensors


def _count(rank: Mapping[str, TensorInfo]) -> int:
    """Tensor-parallel size, from the columns of a square row-parallel matrix."""
    matrices = (
        t.shape for name, t in rank.items() if name.endswith(_ROW_PARALLEL[0]) and len(t.shape) == 2 and t.shape[1]
    )
    shape = next(matrices, None)
    return shape[0] // shape[1] if shape else 1


def _join(parts: Sequence[TensorInfo]) -> JoinedTensor:
    first, count = parts[0], len(parts)
    rows, width = first.shape[0] if first.shape else 1, first.row_bytes
    name = first.name
    shape = first.shape
    if name.endswith((*_COLUMN_PARALLEL, *_COLUMN_PARALLEL_GLU)):
        shape = (rows * count, *shape[1:])
    elif name.endswith(_ROW_PARALLEL):
        shape = (rows, shape[1] * count)
    else:
        parts = parts[:1]
    extents = tuple(extent for rank, part in enumerate(parts) for extent in _extents(part, rank, count, rows, width))
    tensor = replace(first, shape=shape, size=first.size * len(parts))
    view = ExtentView(name=name, rows=shape[0] if shape else 1, width=tensor.row_bytes, extents=extents)
    return JoinedTensor(tensor=tensor, view=view)


def _extents(part: TensorInfo, rank: int, count: int, rows: int, width: int) -> Iterator[Extent]:
    """The extents of a rank's part in the joined tensor."""
    if part.name.endswith(_COLUMN_PARALLEL_GLU):
        half = rows // 2
        for place in range(2):
            start = part.start + place * half * width
            yield Extent(file=part.file, start=start, row=(place * count + rank) * half, rows=half, left=0, width=width)
    elif part.name.endswith(_ROW_PARALLEL):
        yield Extent(file=part.file, start=part.start, row=0, rows=rows, left=rank * width, width=width)
    else:
        yield Extent(file=part.file, start=part.start, row=rank * rows, rows=rows, left=0, width=width)


class SatReader(HfReader):
    """A SwissArmyTransformer checkpoint read like a Hugging Face directory.

    Args:
        path: the directory.
        joined: its tensors.
        config: its config.json.
        hf_files: another directory of auxiliary files, or None.
    """

    splits_columns = True

    def __init__(
        self, path: Path, joined: Mapping[str, JoinedTensor], config: dict[str, Any], hf_files: Path | None
    ) -> None:
        self.path, self.config = path, config
        self.auxiliary_directories = (path, hf_files) if hf_files else (path,)
        self._joined = joined
        self.tensors = {name: tensor.tensor for name, tensor in joined.items()}
        self.layout = default_layout([(t.name, t.dtype, t.shape) for t in self.tensors.values()])
        extents = (extent for tensor in joined.values() for extent in tensor.view.extents)
        self.files = sorted({extent.file.relative_to(path).as_posix() for extent in extents})
        self._files = OpenFiles()

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """As `HfReader.rows`."""
        view = self._joined[name].view
        yield from view.blocks(self._files, first, view.rows if count is None else count)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """As `HfReader.weights`; never quantised."""
        return {name: Weight(tensor=tensor.tensor, joined=tensor.view) for name, tensor in self._joined.items()}


def head_dims(joined: Mapping[str, JoinedTensor]) -> set[int]:
    """head_dim from the shapes of `inv_freq`, `[head_dim / 2]`."""
    shapes: Iterator[Shape] = (tensor.tensor.shape for name, tensor in joined.items() if name.endswith("inv_freq"))
    return {2 * shape[0] for shape in shapes}
