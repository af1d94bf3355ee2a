"""Reader of directories of kind te: TransformerEngine parameters in safetensors shards, and `layers.json`.

The modules' `_extra_state` entries are byte tensors, empty without FP8; `load_state_dict(strict=True)` requires each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import ExtentView, view_of
from shared.checkpoint.dtypes import Dtype, weight_dtype
from shared.checkpoint.formats.hugging_face import stored_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.mapping.layout import Shape

LAYERS = "layers.json"  # constructor arguments of each module (`shared.mapping.transformer_engine_modules`)
STATE = "_extra_state"
STATE_TYPE = "U8"  # safetensors' name


@dataclass(frozen=True, kw_only=True)
class TeTensor:
    """A parameter."""

    key: str
    dtype: Dtype
    shape: Shape
    stored: TensorInfo

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stored.size

    @property
    def place(self) -> str:
        """Path of its file."""
        return self.stored.place


class TeReader:
    """The parameters of a directory of kind te; UserError if a file is missing or damaged."""

    splits_columns = False

    def __init__(self, directory: Path, flag: str = "--source") -> None:
        self.directory = directory
        self._files = OpenFiles()
        self.tensors: dict[str, TeTensor] = {}
        self.non_weights: dict[str, str] = {}  # `_extra_state` entries: name -> dtype
        self._states: list[str] = []  # those that are not empty
        for name, tensor in stored_weights(directory, flag).tensors().items():
            if name.rpartition(".")[2] == STATE:
                self.non_weights[name] = tensor.dtype
                self._states += [name] if tensor.size else []
                continue
            dtype = weight_dtype(tensor.dtype, name, tensor.place)
            self.tensors[name] = TeTensor(key=name, dtype=dtype, shape=tensor.shape, stored=tensor)

    def fp8_states(self) -> list[str]:
        """Names of FP8 states (scales, amax histories): of `_extra_state` entries that are not empty."""
        return sorted(self._states)

    def rows(self, key: str, index: Shape, first: int, count: int) -> Iterator[memoryview]:
        """Rows `first` to `first + count` of `tensor[index]` in blocks of whole rows.

        A block is valid until the next is requested.
        """
        yield from self.view(key, index).blocks(self._files, first, count)

    def view(self, key: str, index: Shape) -> ExtentView:
        """The view of `tensor[index]`."""
        stored = self.tensors[key].stored
        sizes, shape, place = stored.shape[: len(index)], stored.shape[len(index) :], 0
        for at, size in zip(index, sizes, strict=True):
            place = place * size + at
        size = stored.size // prod(sizes)
        return view_of(replace(stored, shape=shape, start=stored.start + place * size, size=size))

    def files_of(self, key: str, index: Shape) -> frozenset[Path]:
        """The file of a tensor."""
        return frozenset([self.tensors[key].stored.file])

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())
