"""`pytorch_model.bin`: a state dict that torch.save wrote, found tensor by tensor without running its pickle."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.blocks import Files
from shared.checkpoint.safetensors_file import Header, TensorInfo, tensor_bytes
from shared.checkpoint.torch_pickle import StorageType, read_pickle
from shared.errors import UserError

# torch's storage classes by the names of safetensors' types.
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


def read_torch_weights(path: Path) -> Header:
    """Where each tensor of the file lies, in the order of the state dict; the header has no text of its own.

    Raises:
        UserError: the file is damaged, older than torch 1.6, asks for code, or holds a tensor that is not contiguous.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is cut short, or was written by a torch older than 1.6; fetch it again, or open and save it with "
            "a newer torch"
        ) from None
    with archive, Files() as files:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is not what torch.save writes: it has {len(pickles)} data.pkl; fetch it again")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: its numbers are big-endian; save it again on a little-endian machine")
        content = read_pickle(archive.read(pickles[0]), path)
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds no state dict, a mapping of names to tensors; save model.state_dict()")
        found = tuple(_tensor(str(name), value, archive, root, files, path) for name, value in content.items())
    return Header(text="", metadata=None, tensors=found)


def _tensor(name: str, value: Any, archive: zipfile.ZipFile, root: str, files: Files, path: Path) -> TensorInfo:
    try:
        kind, (_, storage, key, _, count), offset, shape, stride = value
        dtype = _TYPES[storage.name]
        entry = archive.getinfo(f"{root}data/{key}")
    except (TypeError, ValueError, AttributeError, KeyError):
        what = value[1][1] if isinstance(value, tuple) and len(value) > 1 and isinstance(value[1], tuple) else value
        shown = what.name if isinstance(what, StorageType) else type(what).__name__
        raise UserError(f"{path}: {name} is no plain tensor ({shown}); save the weights alone") from None
    contiguous = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    plain = all(s == c or n == 1 for s, c, n in zip(stride, contiguous, shape, strict=True))
    size = tensor_bytes(dtype, shape)
    start = offset * tensor_bytes(dtype, (1,))
    if kind != "tensor" or entry.compress_type != zipfile.ZIP_STORED or not plain or offset + prod(shape) > count:
        raise UserError(f"{path}: {name} is not stored contiguously; save it again with `.contiguous()`")
    if entry.file_size < start + size:
        raise UserError(f"{path}: {name} is cut short; fetch the file again")
    # The local header's name and extra field may be longer than the central directory's.
    lengths = struct.unpack("<2H", files.read(path, entry.header_offset + 26, 4))
    data = entry.header_offset + 30 + sum(lengths)
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=path, start=data + start, size=size)
