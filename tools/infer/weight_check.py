"""What may replace the weights of a running server: a directory that differs from the server's in the values alone.

Everything is read and checked in the server's process, before the engine hears of it. vLLM's own reload checks nothing: a
directory that is cut short or of another shape ends the engine, one that lacks tensors is answered with NaN from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import for_transformers_4_and_5, read_config
from shared.checkpoint.directory.manifest import MANIFEST
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.target import PARTIAL
from shared.checkpoint.formats.hugging_face import WeightLayout, stored_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.families import registry

_FLOATING = {"F64", "F32", "F16", "BF16"}  # safetensors' names
# Files that a server reads when it starts, and not again.
_READ_AT_START = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "*processor_config.json"),
)
_NOTES = {"transformers_version", "_from_model_config", "name_or_path"}  # without effect
_DECIDE = ("dtype", "eos_token_id", "bos_token_id")  # fields of config.json beside the architecture


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file that has been checked, and how to see that it is still the same."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds

    @staticmethod
    def of(path: Path) -> WeightFile:
        state = path.stat()
        return WeightFile(path=str(path), size=state.st_size, modified=state.st_mtime_ns)


class OutsideFolderError(UserError):
    """A path that the server was not started for."""


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """The directory that a server was started with. Kept, since files may change under a running server.

    Attributes:
        directory: its path.
        tensors: names with safetensors' dtype and shape.
        config: config.json.
        architecture: of config.json; None for an unknown family.
        read_at_start: content of the files beside the weights.
    """

    directory: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    config: Mapping[str, Any]
    architecture: Any
    read_at_start: Mapping[str, Any]

    @staticmethod
    def read(directory: Path) -> ServedWeights:
        """Those of a directory that `open_hf_directory` has accepted."""
        return ServedWeights(
            directory=directory,
            tensors=_described(stored_weights(directory, "--source")),
            config=_config(directory),
            architecture=_architecture(directory),
            read_at_start=dict(_files_read_at_start(directory)),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: shape for name, (_, shape) in self.tensors.items()}

    def check(self, path: Path) -> list[WeightFile]:
        """The weight files of a directory that may replace these. UserError says what is wrong with it.

        A directory with a manifest is compared with its hashes. config.json, tokenizer and the like may be absent; those
        that are there must say the same. Names, shapes and dtypes are those of the start; all numbers are finite.
        """
        if not path.is_dir():
            raise UserError(f"path {path} is not a directory")
        if PARTIAL in path.name:
            raise UserError(f"path {path} is incomplete: its writer has not finished, or was killed")
        if (path / MANIFEST).is_file():
            open_checkpoint(path, kinds=("hf",), flag="path")
        layout = stored_weights(path, "path")
        found = layout.tensors()
        if other := next((file for file in layout.shards if not file.file.endswith(".safetensors")), None):
            raise UserError(f"path {path / other.file}: only safetensors replace the weights of a running server")
        self.check_tensors(_described(layout), f"path {path}")
        if (path / "config.json").is_file():
            self._check_config(path)
        for name, content in _files_read_at_start(path):
            if self.read_at_start.get(name) != content:
                raise UserError(f"path {path / name} is not the file that the server has read; start a server with it")
        files = [WeightFile.of(path / shard.file) for shard in layout.shards]
        check_finite(found, "path")
        if files != [WeightFile.of(path / shard.file) for shard in layout.shards]:
            raise UserError(f"path {path} has changed while it was read")
        return files

    def check_tensors(self, found: Mapping[str, tuple[str, tuple[int, ...]]], place: str) -> None:
        """UserError, with `place` in front, unless dtypes (safetensors' names) and shapes by name are these."""
        if missing := sorted(self.tensors.keys() - found.keys()):
            raise UserError(f"{place} lacks {_some(missing)}")
        if unknown := sorted(found.keys() - self.tensors.keys()):
            raise UserError(f"{place} has {_some(unknown)}, which {self.directory} has not")
        for name, (dtype, shape) in found.items():
            wanted, size = self.tensors[name]
            if shape != size:
                raise UserError(f"{place}: {name} is {list(shape)}, the server's is {list(size)}")
            if dtype != wanted:
                raise UserError(f"{place}: {name} is {dtype}, the server's is {wanted}; save it in that dtype")

    def _check_config(self, path: Path) -> None:
        mine, theirs = self.config, _config(path)
        given = _architecture(path)
        if self.architecture is not None and given is not None:
            if difference := registry.first_difference(given, self.architecture):
                field, value = difference
                raise UserError(f"path {path} is another architecture: {field} is {value!r}; start a server with it")
            names = {name for name in _DECIDE if name in theirs}
        else:
            names = (mine.keys() | theirs.keys()) - _NOTES
        for name in sorted(names):
            if theirs.get(name) != mine.get(name):
                raise UserError(
                    f"path {path / 'config.json'}: {name} is {theirs.get(name)!r}, the server's is {mine.get(name)!r}; "
                    "start a server with it"
                )


def below(path: str, folder: Path) -> Path:
    """`path`, if it is below `folder` with links followed; else OutsideFolderError. The caller of a server chooses the path."""
    given, resolved = Path(path), folder.resolve()
    real = given.resolve()
    if not given.is_absolute() or resolved not in real.parents:
        raise OutsideFolderError(f"path {path} is not below {folder}, the only place that this server reads from")
    return real


def _described(layout: WeightLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layout.tensors().items()}


def _config(directory: Path) -> dict[str, Any]:
    return for_transformers_4_and_5(read_config(directory / "config.json"))


def _architecture(directory: Path) -> Any:
    try:
        return registry.from_files(directory)
    except UserError:
        return None


def _files_read_at_start(directory: Path) -> Iterator[tuple[str, Any]]:
    """Name and content; of JSON objects without the notes of their writer, however they are formatted."""
    for file in sorted(directory.iterdir()):
        if not any(fnmatchcase(file.name, pattern) for pattern in _READ_AT_START) or not file.is_file():
            continue
        content: Any = file.read_bytes()
        if file.suffix == ".json":
            try:
                content = json.loads(content)
            except ValueError:
                raise UserError(f"path {file} is not JSON") from None
            if isinstance(content, dict):
                content = {name: value for name, value in content.items() if name not in _NOTES}
        yield file.name, content


def check_finite(tensors: Mapping[str, TensorInfo], place: str) -> None:
    """UserError, with `place` in front, for a number that is NaN or infinite."""
    if found := not_finite(tensors):
        raise UserError(f"{place} {tensors[found].file}: {found} has numbers that are NaN or infinite")


def not_finite(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor with a number that is NaN or infinite."""
    import torch
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _FLOATING:
            by_file.setdefault(tensor.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, "pt") as stored:
            for name in names:
                if not torch.isfinite(stored.get_tensor(name)).all():
                    return name
    return None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
