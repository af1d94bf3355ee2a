"""Pickles of torch checkpoints: written without torch, read without running code.

A pickle is a program. The reader maps the classes of torch.distributed.checkpoint and Megatron-Core to plain records, and
refuses every other name.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from shared.checkpoint.dtypes import BY_NAME
from shared.errors import UserError

_DCP = "torch.distributed.checkpoint"


class Record:
    """Stand-in for an object of an allowed class: the state becomes attributes, no code of the class runs."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __hash__(self) -> int:
        return hash((getattr(self, "fqn", None), getattr(self, "offset", None)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.__dict__ == other.__dict__


def _shape(values: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


@dataclass(frozen=True)
class StorageType:
    """A torch storage class, by name."""

    name: str


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> tuple[Any, ...]:
    return ("tensor", storage, int(offset), _shape(size), _shape(stride))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


_RECORDS = {
    f"{_DCP}.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{(module, name): Record for module, names in _RECORDS.items() for name in names},
    ("torch", "Size"): _shape,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}
# Allowed with `training=True`: arguments, RNG and optimizer state. Only the arguments are read.
_OF_TRAINING = {
    "argparse": {"Namespace"},
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "collections": {"defaultdict", "deque"},
    "datetime": {"timedelta"},
    "numpy": {"ndarray", "dtype", "bool_", "float32", "float64", "int64"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"Path", "PosixPath"},
    "signal": {"Signals"},
    "torch": {"device", "float", "half", "long", "int"},
    "torch._utils": {"_rebuild_device_tensor_from_numpy"},
    "torch.torch_version": {"TorchVersion"},
}
_TRAINING_PACKAGES = ("megatron.", "transformer_engine.")  # enums and configs in the arguments
_BUILTINS = ("__builtin__", "builtins")
_DTYPES = {*BY_NAME, "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "float8_e5m2"}
_STORAGES = {
    *("BFloat16Storage", "HalfStorage", "FloatStorage", "DoubleStorage", "ByteStorage", "CharStorage"),
    *("ShortStorage", "IntStorage", "LongStorage", "BoolStorage"),
}


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, place: str, training: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._place, self._training = place, training

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        if module == "torch" and name in _STORAGES:
            return StorageType(name)
        if self._training:
            if name in _OF_TRAINING.get(module, ()) or module.startswith(_TRAINING_PACKAGES):
                return Record
            if module in _BUILTINS and name in ("set", "frozenset"):
                return frozenset
        self._refuse(module, name)

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise UserError(
            f"{self._place} names {module}.{name}, which is not allowed in a weight checkpoint; "
            "it was not executed. Do not load this file with another program"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_pickle(data: bytes, place: Path | str, *, training: bool = False) -> Any:
    """The content of a checkpoint's pickle, objects as `Record`.

    Args:
        data: the pickle.
        place: for messages.
        training: also allow the classes of arguments, RNG and optimizer state.

    Raises:
        UserError: the pickle is damaged, or names an unknown class.
    """
    try:
        return _Reader(data, str(place), training).load()
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} is damaged: {error}; fetch or write the checkpoint again") from None


@dataclass(frozen=True)
class Name:
    """A module-level name: class, function, or constant (torch.bfloat16)."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """`function(*arguments)`."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Instance:
    """An object created by `__new__` with a state."""

    type: Name
    state: Any


@dataclass(frozen=True)
class Pairs:
    """A dict with unhashable keys, its items generated during writing."""

    items: Iterable[tuple[Any, Any]]


@dataclass(frozen=True)
class Persistent:
    """torch's persistent id of a storage in the same archive."""

    id: tuple[Any, ...]


def write_pickle(value: Any) -> bytes:
    """Pickle, protocol 2, of plain values and of `Name`, `Call`, `Instance`, `Pairs`, `Persistent`."""
    out = io.BytesIO()
    write_pickle_to(out, value)
    return out.getvalue()


def write_pickle_to(out: BinaryIO, value: Any) -> None:
    """`write_pickle` into a file."""
    out.write(pickle.PROTO + b"\x02")
    _write(value, out.write, {})
    out.write(pickle.STOP)


def _write(value: Any, put: Callable[[bytes], Any], memo: dict[Name | str, int]) -> None:
    match value:
        case None:
            put(pickle.NONE)
        case bool():
            put(pickle.NEWTRUE if value else pickle.NEWFALSE)
        case int():
            _write_int(value, put)
        case float():
            put(pickle.BINFLOAT + struct.pack(">d", value))
        case str() | Name():
            _write_shared(value, put, memo)
        case tuple():
            put(pickle.MARK)
            for item in value:
                _write(item, put, memo)
            put(pickle.TUPLE)
        case list():
            put(pickle.EMPTY_LIST + pickle.MARK)
            for item in value:
                _write(item, put, memo)
            put(pickle.APPENDS)
        case Mapping() | Pairs():
            put(pickle.EMPTY_DICT + pickle.MARK)
            for key, item in value.items if isinstance(value, Pairs) else value.items():
                _write(key, put, memo)
                _write(item, put, memo)
            put(pickle.SETITEMS)
        case Call():
            _write(value.function, put, memo)
            _write(value.arguments, put, memo)
            put(pickle.REDUCE)
        case Instance():
            _write(value.type, put, memo)
            put(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            _write(value.state, put, memo)
            put(pickle.BUILD)
        case Persistent():
            _write(value.id, put, memo)
            put(pickle.BINPERSID)
        case _:
            raise TypeError(f"{type(value).__name__} cannot be pickled here")


def _write_shared(value: str | Name, put: Callable[[bytes], Any], memo: dict[Name | str, int]) -> None:
    """Strings and names are memoised: the metadata of a large model repeats them."""
    if value in memo:
        put(pickle.LONG_BINGET + struct.pack("<I", memo[value]))
        return
    if isinstance(value, Name):
        put(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
    else:
        raw = value.encode()
        put(pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw)
    memo[value] = len(memo)
    put(pickle.LONG_BINPUT + struct.pack("<I", memo[value]))


def _write_int(value: int, put: Callable[[bytes], Any]) -> None:
    if -(1 << 31) <= value < 1 << 31:
        put(pickle.BININT + struct.pack("<i", value))
    else:
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        put(pickle.LONG1 + bytes([len(raw)]) + raw)
