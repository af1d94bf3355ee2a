"""Hugging Face directories: safetensors shards, read and written; pytorch_model.bin shards, read.

Shapes are the stored ones, `[out, in]` for linear weights; a row is one index of the first dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import HashedFile, OpenFiles
from shared.checkpoint.copy.operations import Block, CopyOperation, FilePlan, WriteBytes, copy_rows, pack_blocks, stream
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.checkpoint.formats.safetensors_file import (
    Header,
    TensorInfo,
    encode_header,
    header_bytes,
    parse_header,
    read_header,
    tensor_bytes,
    weight_map_of,
)
from shared.console import log
from shared.errors import UserError
from shared.mapping.layout import Shape
from shared.quantized.scheme import QuantizationScheme, quantization_scheme
from shared.quantized.stored_weight import Weight, assemble_weights, check_stored_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
LAYOUT = "weights.json"  # in `hf/` of a Megatron directory: the source's shards, for a byte-identical export
SHARD_BYTES = 5_000_000_000  # transformers' default
_PLAIN = {"F64", "F32", "F16", "BF16", "BOOL", "I64"}  # dtypes of weights, and of masks and positions in old files
_VALUE_HEAD = "v_head."  # of TRL, beside the wrapped model: no part of it
RecordHash = Callable[[str, str], None]  # (relative name, content hash)


def without_prefix(name: str, prefix: str) -> str:
    """A tensor name without what a wrapper put in front of it, or of a part of it: `model.PREFIXlayers.0...`.

    Attributes that begin with _ (`_fsdp_wrapped_module.`) may be wrapped in each other: all of them are removed.
    """
    return re.sub(rf"(?:^|(?<=\.)){re.escape(prefix)}", "", name, count=0 if prefix.startswith("_") else 1)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file of a layout."""

    file: str
    header: Header


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Assignment of tensors to safetensors shards, with the exact text of each header."""

    shards: tuple[Shard, ...]
    index: str | None  # text of the index file; None for a single file

    def tensors(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.header.tensors}

    def encode(self) -> str:
        """The content of `hf/weights.json`."""
        shards = [{"file": shard.file, "header": shard.header.text} for shard in self.shards]
        return json.dumps({"version": 1, "shards": shards, "index": self.index}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> WeightLayout:
        """The layout of a `hf/weights.json`; UserError if it is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple(
                Shard(file=shard["file"], header=parse_header(shard["header"], path)) for shard in content["shards"]
            )
            if outside := [shard.file for shard in shards if Path(shard.file).name != shard.file]:
                raise ValueError(f"{outside[0]!r} is not a plain file name")
            return WeightLayout(shards=shards, index=content["index"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); convert the model again") from None

    def dequantized(self, scheme: QuantizationScheme | None) -> WeightLayout:
        """The same shards with dequantised weights instead of quantised ones and their scales."""
        weights = assemble_weights(scheme, self.tensors())
        if not any(weight.quantized for weight in weights.values()):
            return self
        by_name = {weight.stored[0].name: weight for weight in weights.values()}
        shards = []
        for shard in self.shards:
            dequantized = [by_name[tensor.name] for tensor in shard.header.tensors if tensor.name in by_name]
            triples = [(weight.name, weight.dtype, weight.shape) for weight in dequantized]
            if triples:
                header = parse_header(encode_header(triples, shard.header.metadata), Path(shard.file))
                shards.append(Shard(file=shard.file, header=header))
        return WeightLayout(shards=tuple(shards), index=_index(shards) if self.index is not None else None)

    def with_dtypes(self, dtypes: Mapping[str, str]) -> WeightLayout:
        """The same shards with other dtypes by tensor name. If no dtype changes, the headers stay verbatim."""
        if all(dtypes.get(name, tensor.dtype) == tensor.dtype for name, tensor in self.tensors().items()):
            return self
        return self._each(lambda t: (t.name, dtypes.get(t.name, t.dtype), t.shape))

    def without_prefix(self, prefix: str, left_out: str) -> WeightLayout:
        """The same shards with names as `without_prefix` has them; tensors under the prefix `left_out` are left out."""
        shards = []
        for shard in self.shards:
            kept = [t for t in shard.header.tensors if not t.name.startswith(left_out)]
            named = tuple(replace(t, name=without_prefix(t.name, prefix)) for t in kept)
            shards.append(Shard(file=shard.file, header=replace(shard.header, tensors=named, text="")))
        return WeightLayout(shards=tuple(shards), index=self.index)

    def with_shapes(self, shapes: Mapping[str, Shape]) -> WeightLayout:
        """The same shards with other shapes by tensor name."""
        return self._each(lambda t: (t.name, t.dtype, shapes.get(t.name, t.shape)))

    def _each(self, change: Callable[[TensorInfo], tuple[str, str, Shape]]) -> WeightLayout:
        """The same shards, with each tensor's name, dtype and shape changed."""
        shards = []
        for shard in self.shards:
            header = encode_header([change(t) for t in shard.header.tensors], shard.header.metadata)
            shards.append(Shard(file=shard.file, header=parse_header(header, Path(shard.file))))
        return WeightLayout(shards=tuple(shards), index=_index(shards) if self.index is not None else None)

    def with_tensor(self, name: str, dtype: str, shape: Shape) -> WeightLayout:
        """The same shards with one more tensor at the end of the last shard."""
        *shards, last = self.shards
        triples = [(t.name, t.dtype, t.shape) for t in last.header.tensors] + [(name, dtype, shape)]
        header = parse_header(encode_header(triples, last.header.metadata), Path(last.file))
        shards.append(Shard(file=last.file, header=header))
        return WeightLayout(shards=tuple(shards), index=_index(shards) if self.index is not None else None)


class HfReader:
    """Reader of a Hugging Face directory; index and headers are checked against each other.

    `layout` is the layout of an export: the source's shards, as safetensors if the source is pytorch_model.bin.

    Raises:
        UserError: a file is missing or damaged; index and headers disagree; a tensor or shard is not in the index.
    """

    splits_columns = False  # whether a row is split over files, as in row-parallel weights of per-rank checkpoints

    def __init__(self, path: Path, flag: str = "--source", strip_prefix: str = "") -> None:
        self.path = path
        self.auxiliary_directories: tuple[Path, ...] = (path,)
        self.config = read_config(path / "config.json")
        stored = stored_weights(path, flag)
        if strip_prefix:
            if heads := [name for name in stored.tensors() if name.startswith(_VALUE_HEAD)]:
                log(f"{flag} {path}: left out, TRL's value head: {', '.join(heads)}")
            stored = stored.without_prefix(strip_prefix, _VALUE_HEAD)
        self.files = [shard.file for shard in stored.shards]
        self.tensors: dict[str, TensorInfo] = stored.tensors()
        self.layout = stored if all(shard.header.text for shard in stored.shards) else _as_safetensors(stored)
        self._files = OpenFiles()

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """Rows `first` to `first + count` in blocks of whole rows. A block is valid until the next is requested."""
        tensor = self.tensors[name]
        size = tensor.size if count is None else count * tensor.row_bytes
        return self._files.blocks(tensor.file, tensor.start + first * tensor.row_bytes, size, tensor.row_bytes)

    @cached_property
    def scheme(self) -> QuantizationScheme | None:
        """The weights' quantisation scheme; UserError if it is not supported."""
        return scheme_of(self.config, self.tensors)

    @property
    def leftover(self) -> str | None:
        """The method of a quantization_config whose weights are not quantised: of a merged or dequantised model."""
        given = self.config.get("quantization_config")
        if given is None or self.scheme is not None:
            return None
        return str(given.get("quant_method")) if isinstance(given, Mapping) else repr(given)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Weights by name, dequantised on read. UserError if the quantisation scheme is not supported."""
        weights = assemble_weights(self.scheme, self.tensors)
        check_stored_shapes(weights, self._files)
        return weights

    def values(self, name: str) -> Iterator[memoryview]:
        """A weight's values, dequantised, in blocks. A block is valid until the next is requested."""
        view = self.weights[name].view()
        return stream(copy_rows(view, 0, view.rows), self._files)

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that hold a directory's weights."""

    files: tuple[str, ...]
    index: str | None  # None for a single file
    weight_map: Mapping[str, str]  # of the index: tensor -> file
    read: Callable[[Path], Header]


# In the order of transformers' `_get_resolved_checkpoint_files` (modeling_utils.py): safetensors first, and of each format the
# whole file, whose index is then stale. vLLM's `_prepare_weights` (default_loader.py) prefers safetensors too, but among them
# follows the index; `infer` shows it the files chosen here only.
_FORMS: tuple[tuple[str, str, str, Callable[[Path], Header]], ...] = (
    (SINGLE, INDEX, "model-*.safetensors", read_header),
    (TORCH_SINGLE, TORCH_INDEX, "pytorch_model-*.bin", read_pytorch_bin),
)
_NUMBERED = re.compile(r"(.+)-\d+-of-(\d+)\.\w+")


def holds_weights(path: Path) -> bool:
    """Whether a directory has a file that `choose_weights` looks at."""
    return any((path / single).is_file() or (path / index).is_file() for single, index, _, _ in _FORMS) or any(
        any(path.glob(pattern)) for _, _, pattern, _ in _FORMS
    )


def choose_weights(path: Path, flag: str) -> WeightFiles:
    """The files that are read of all those in a directory, as transformers chooses them.

    Raises:
        UserError: there are none, or the index that would be followed names a missing file, or not all of its shards.
    """
    for single, index, pattern, read in _FORMS:
        if (path / single).is_file():
            return WeightFiles(files=(single,), index=None, weight_map={}, read=read)
        if (path / index).is_file():
            weight_map = weight_map_of(path / index, flag)
            files = tuple(sorted(set(weight_map.values())))
            _check_named(path, flag, index, files, pattern)
            return WeightFiles(files=files, index=index, weight_map=weight_map, read=read)
        if there := sorted(file.name for file in path.glob(pattern)):
            raise UserError(f"{flag} {path / index} is missing, though {there[0]} is there; fetch it again")
    raise UserError(f"{flag} {path} holds no {SINGLE} and no {INDEX}, nor {TORCH_SINGLE}")


def _check_named(path: Path, flag: str, index: str, files: Sequence[str], pattern: str) -> None:
    """UserError if a file of the index is outside the directory or missing, or a shard beside them is not in the index.

    Shards numbered for another count are left over from another save.
    """
    if outside := [name for name in files if Path(name).name != name]:
        raise UserError(f"{flag} {path / index} names {outside[0]!r}, which is outside this directory; fetch it again")
    for name in files:
        if not (path / name).is_file():
            other = f", or remove {index} to read {TORCH_SINGLE}" if (path / TORCH_SINGLE).is_file() else ""
            raise UserError(f"{flag} {path / name} is missing, though {index} names it; fetch it again{other}")
    saves = {match.groups() for name in files if (match := _NUMBERED.fullmatch(name))}
    for name in sorted(file.name for file in path.glob(pattern)):
        if name not in files and (match := _NUMBERED.fullmatch(name)) and match.groups() in saves:
            raise UserError(f"{flag} {path / name} is not in {index}; its tensors would be lost; fetch both again")


def stored_weights(path: Path, flag: str) -> WeightLayout:
    """The shards of a directory from its index and the files' headers; UserError if they disagree."""
    chosen = choose_weights(path, flag)
    if chosen.index is not None:
        return _sharded(path, flag, chosen, chosen.index)
    (single,) = chosen.files
    return WeightLayout(shards=(Shard(file=single, header=chosen.read(path / single)),), index=None)


def scheme_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> QuantizationScheme | None:
    """The quantisation scheme of stored tensors; None if all are plain numbers, whatever quantization_config says.

    Raises:
        UserError: the scheme of quantised tensors is not supported.
    """
    return None if all(tensor.dtype in _PLAIN for tensor in tensors.values()) else quantization_scheme(config)


def check_not_left_over(path: Path, place: str) -> None:
    """UserError if transformers and vLLM would quantise plain weights, for the quantization_config of another state of them.

    `place`: flag and path, for the message.
    """
    if read_config(path / "config.json").get("quantization_config") is None:
        return
    if method := HfReader(path).leftover:
        raise UserError(
            f"{place}: config.json has a quantization_config ({method}) and no weight is quantised; remove it from config.json"
        )


def _as_safetensors(stored: WeightLayout) -> WeightLayout:
    """The safetensors layout of pytorch_model.bin shards, named as in transformers."""
    shards = []
    for shard in stored.shards:
        name = Path(shard.file.removeprefix("pytorch_")).with_suffix(".safetensors").name
        triples = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.header.tensors]
        shards.append(Shard(file=name, header=parse_header(encode_header(triples, {"format": "pt"}), Path(name))))
    return WeightLayout(shards=tuple(shards), index=_index(shards) if stored.index is not None else None)


def _sharded(path: Path, flag: str, chosen: WeightFiles, index: str) -> WeightLayout:
    weight_map = chosen.weight_map
    shards: list[Shard] = []
    seen: dict[str, str] = {}
    for name in chosen.files:
        header = chosen.read(path / name)
        shards.append(Shard(file=name, header=header))
        for tensor in header.tensors:
            if tensor.name in seen:
                raise UserError(
                    f"{flag} {path / name} and {seen[tensor.name]} both hold {tensor.name}; fetch them again"
                )
            seen[tensor.name] = name
            named = weight_map.get(tensor.name)
            if named is None:
                raise UserError(f"{flag} {path / name}: {tensor.name} is not in {index}; fetch both again")
            if named != name:
                raise UserError(
                    f"{flag} {path / index} says that {tensor.name} is in {named}, but it is in {name}; fetch both again"
                )
    if absent := [tensor for tensor in weight_map if tensor not in seen]:
        raise UserError(
            f"{flag} {path / weight_map[absent[0]]}: {absent[0]} is missing, though {index} names it; fetch both again"
        )
    return WeightLayout(shards=tuple(shards), index=(path / index).read_text(encoding="utf-8"))


def default_layout(
    tensors: Sequence[tuple[str, str, Shape]], shard_bytes: int = SHARD_BYTES, file: str | None = None
) -> WeightLayout:
    """Shards for (name, safetensors dtype, shape), split as in transformers: at most `shard_bytes` each.

    With `file`: a single shard of this name.
    """
    if file is not None:
        header = parse_header(encode_header(tensors, None), Path(file))
        return WeightLayout(shards=(Shard(file=file, header=header),), index=None)
    groups: list[list[tuple[str, str, Shape]]] = [[]]
    room = shard_bytes
    for name, dtype, shape in tensors:
        size = tensor_bytes(dtype, shape)
        if groups[-1] and size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append((name, dtype, shape))
        room -= size
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        header = parse_header(encode_header(group, {"format": "pt"}), Path(name))
        shards.append(Shard(file=name, header=header))
    return WeightLayout(shards=tuple(shards), index=_index(shards) if count > 1 else None)


def _index(shards: Iterable[Shard]) -> str:
    tensors = sorted((t.name, shard.file, t.size) for shard in shards for t in shard.header.tensors)
    content: dict[str, Any] = {
        "metadata": {"total_size": sum(size for _, _, size in tensors)},
        "weight_map": {name: file for name, file, _ in tensors},
    }
    return json.dumps(content, indent=2) + "\n"


def weight_files(
    layout: WeightLayout,
    operations: Callable[[TensorInfo], Iterable[CopyOperation]],
    sources: Callable[[TensorInfo], Iterable[Path]],
) -> list[FilePlan]:
    """File plans of a layout's shards.

    Args:
        layout: the shards.
        operations: a tensor's copy operations, in order.
        sources: the source files of a tensor's operations.
    """

    def blocks(shard: Shard) -> Iterator[Block]:
        pieces = (operation for tensor in shard.header.tensors for operation in operations(tensor))
        return pack_blocks(chain([WriteBytes(header_bytes(shard.header.text))], pieces))

    return [
        FilePlan(
            name=shard.file,
            size=len(header_bytes(shard.header.text)) + sum(tensor.size for tensor in shard.header.tensors),
            sources=frozenset(path for tensor in shard.header.tensors for path in sources(tensor)),
            make_blocks=partial(blocks, shard),
        )
        for shard in layout.shards
    ]


def write_index(directory: Path, layout: WeightLayout) -> None:
    """Write the index file, if the layout has one."""
    if layout.index is not None:
        (directory / INDEX).write_text(layout.index, encoding="utf-8")


def write_weights(
    directory: Path, layout: WeightLayout, blocks: Callable[[TensorInfo], Iterable[memoryview]], record: RecordHash
) -> None:
    """Write every shard, and the index if the layout has one.

    Args:
        directory: output directory.
        layout: the shards.
        blocks: a tensor's bytes, in order.
        record: called with each file's name and content hash.
    """
    for shard in layout.shards:
        file = HashedFile(directory / shard.file)
        file.write(header_bytes(shard.header.text))
        for tensor in shard.header.tensors:
            for block in blocks(tensor):
                file.write(block)
            end = tensor.start + tensor.size
            assert file.position == end, f"{tensor.name}: {file.position} bytes written instead of {end}"
        record(shard.file, file.close())
    write_index(directory, layout)
