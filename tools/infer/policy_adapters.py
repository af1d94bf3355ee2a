"""LoRA adapters that a trainer publishes as the policy of `infer rollouts --lora-rank`: checked whole, and held in a copy.

vLLM skips what an adapter lacks, and reads its files again whenever it needs them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.checkpoint.directory.adapter_directory import CONFIG, WEIGHTS
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.formats.safetensors_file import read_header
from shared.checkpoint.lora.policy_stamp import PolicyStamp
from shared.errors import UserError
from tools.infer.served_adapters import TENSOR, Shapes, check_adapter
from tools.infer.weight_check import WeightFile

VERSIONS = 2  # adapters in one batch: the policy, and late requests for the one before
_FILES = (CONFIG, WEIGHTS)
# Fields of PEFT that take modules away from target_modules, or add others.
_OTHER_TARGETS = ("target_parameters", "layers_to_transform", "exclude_modules", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class HeldAdapter:
    """A checked adapter, in a folder of the server's own.

    Attributes:
        version: of the policy, and its name in requests.
        origin: the directory that was published.
        path: of the copy.
        content: digest of the files.
    """

    version: str
    origin: Path
    path: Path
    content: str


@dataclass(frozen=True, kw_only=True)
class PolicyAdapters:
    """Which adapters a server takes.

    Attributes:
        base: `weights_digest` of the server's model.
        shapes: of its tensors, by name.
        rank: the largest that it has room for.
        modules: last parts of names that may be adapted; None: all.
        fused: those of fused projections that may not, with the parts that vLLM has adapters for.
    """

    base: str
    shapes: Shapes
    rank: int
    modules: Collection[str] | None
    fused: Mapping[str, Sequence[str]]

    def hold(self, path: Path, version: str, folder: Path) -> HeldAdapter:
        """Check the directory that was published as `version`, and copy it into `folder`, which is new.

        Raises:
            UserError: it is no adapter of the server's model, lacks a tensor, or is another version's.
        """
        if not path.is_dir():
            raise UserError(f"adapter {path} is not a directory")
        before = self._files(path)
        self._check(path, version)
        digest = xxhash.xxh3_128()
        folder.mkdir()
        for name in _FILES:
            shutil.copyfile(path / name, folder / name)
            digest.update((folder / name).read_bytes())
        if self._files(path) != before:
            raise UserError(f"adapter {path} has changed while it was read")
        return HeldAdapter(version=version, origin=path, path=folder, content=digest.hexdigest())

    @staticmethod
    def _files(path: Path) -> list[WeightFile]:
        return [WeightFile.of(path / name) for name in _FILES if (path / name).is_file()]

    def _check(self, path: Path, version: str) -> None:
        place = "adapter"
        fields = read_config(path / CONFIG) if (path / CONFIG).is_file() else {}
        rank = fields.get("r")
        if isinstance(rank, int) and rank > self.rank:
            raise UserError(
                f"{place} {path} has rank {rank}, and this server has room for {self.rank}; start it with a larger --lora-rank"
            )
        check_adapter(version, path, self.shapes, place, rank=self.rank, modules=self.modules)
        header = read_header(path / WEIGHTS)
        modules = [match["module"] for tensor in header.tensors if (match := TENSOR.fullmatch(tensor.name))]
        for module in modules:
            if parts := self.fused.get(module.rpartition(".")[2]):
                raise UserError(
                    f"{place} {path} adapts {module}, and vLLM computes adapters of its parts alone ({', '.join(parts)}); leave "
                    "it out of --lora-targets, or publish merged policies"
                )
        self._check_complete(path, fields, {tensor.name for tensor in header.tensors})
        stamp = PolicyStamp.of(header.metadata)
        if stamp is None:
            raise UserError(f"{place} {path / WEIGHTS} does not say of which version and base it is")
        if stamp.base != self.base:
            raise UserError(
                f"{place} {path} was trained on another base than this server's --source: the weights are {stamp.base}, the "
                f"server's {self.base}"
            )
        if stamp.version != version:
            raise UserError(f"{place} {path} is of version {stamp.version}, and was published as {version}")

    def _check_complete(self, path: Path, fields: Mapping[str, Any], names: Collection[str]) -> None:
        """UserError unless every module has its tensors that PEFT would adapt by these fields of adapter_config.json."""
        if other := next((name for name in _OTHER_TARGETS if fields.get(name)), None):
            raise UserError(
                f"adapter {path / CONFIG} has {other}; a policy's adapter names modules by target_modules alone"
            )
        adapted = {match["module"] for match in map(TENSOR.fullmatch, names) if match}
        if missing := next((module for module in self._targets(fields) if module not in adapted), None):
            raise UserError(f"adapter {path} lacks the tensors of {missing}, which its target_modules name")

    def _targets(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """Linear layers of the model that target_modules name: ends of names, or as a text a regular expression of whole ones."""
        targets = fields.get("target_modules") or ()
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight")
            if module == name or len(shape) != 2:
                continue
            if isinstance(targets, str):
                named = re.fullmatch(targets, module) is not None
            else:
                named = any(module == target or module.endswith(f".{target}") for target in targets)
            if named:
                yield module
