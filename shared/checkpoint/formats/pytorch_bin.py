"""`pytorch_model.bin`: a state dict written by torch.save, read without torch and without unpickling code."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.files import check_not_stand_in
from shared.checkpoint.formats.safetensors_file import Header, TensorInfo, tensor_bytes
from shared.checkpoint.formats.torch_pickle import StorageType, read_pickle
from shared.errors import UserError

# torch's storage class -> safetensors dtype.
_TYPES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
}
# Magic number of torch.save before 1.6, a plain pickle.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class TorchFile:
    """A torch.save file: its object, and the location of its tensors.

    Raises:
        UserError: the file is damaged or older than torch 1.6, or its pickle names unknown classes.
    """

    def __init__(self, path: Path, *, training: bool = False) -> None:
        self.path = path
        check_not_stand_in(path)
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            with path.open("rb") as file:
                old = file.read(len(_OLD)) == _OLD
            raise UserError(
                f"{path} has the format of torch before 1.6; load and save it with a newer torch: "
                "torch.save(torch.load(path, map_location='cpu'), path)"
                if old
                else f"{path} is truncated, or not a torch.save file; fetch it again"
            ) from None
        with archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in self._entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is not a torch.save file: it has {len(pickles)} data.pkl; fetch it again")
            self._root = pickles[0].removesuffix("data.pkl")
            order = f"{self._root}byteorder"
            if order in self._entries and archive.read(order) != b"little":
                raise UserError(f"{path} is big-endian; save it again on a little-endian machine")
            try:
                pickled = archive.read(pickles[0])
            except (zipfile.BadZipFile, EOFError) as error:
                raise UserError(f"{path} is damaged: {error}; fetch it again") from None
        self.content = read_pickle(pickled, path, training=training)

    def tensor(self, name: str, value: Any, files: OpenFiles) -> TensorInfo:
        """Location of a tensor; UserError if it is not a plain contiguous tensor."""
        path = self.path
        try:
            kind, (_, storage, key, _, count), offset, shape, stride = value
            dtype = _TYPES[storage.name]
            entry = self._entries[f"{self._root}data/{key}"]
        except (TypeError, ValueError, AttributeError, KeyError):
            what = value[1][1] if isinstance(value, tuple) and len(value) > 1 and isinstance(value[1], tuple) else value
            shown = what.name if isinstance(what, StorageType) else type(what).__name__
            raise UserError(f"{path}: {name} is not a plain tensor ({shown}); save the weights only") from None
        contiguous = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        plain = all(s == c or n == 1 for s, c, n in zip(stride, contiguous, shape, strict=True))
        size = tensor_bytes(dtype, shape)
        start = offset * tensor_bytes(dtype, (1,))
        if kind != "tensor" or entry.compress_type != zipfile.ZIP_STORED or not plain or offset + prod(shape) > count:
            raise UserError(f"{path}: {name} is not stored contiguously; save it again with `.contiguous()`")
        if entry.file_size < start + size:
            raise UserError(f"{path}: {name} is truncated; fetch the file again")
        # Name and extra field of the local header may differ in length from those of the central directory.
        lengths = struct.unpack("<2H", files.read(path, entry.header_offset + 26, 4))
        data = entry.header_offset + 30 + sum(lengths)
        return TensorInfo(name=name, dtype=dtype, shape=shape, file=path, start=data + start, size=size)


def read_pytorch_bin(path: Path) -> Header:
    """The tensors of a file in the order of its state dict, as a header without text.

    Raises:
        UserError: as `TorchFile`; the file holds no state dict; a tensor is not contiguous.
    """
    file = TorchFile(path)
    if not isinstance(file.content, Mapping):
        raise UserError(f"{path} is not a state dict (names to tensors); save model.state_dict()")
    with OpenFiles() as files:
        found = tuple(file.tensor(str(name), value, files) for name, value in file.content.items())
    return Header(text="", metadata=None, tensors=found)
