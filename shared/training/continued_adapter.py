"""`--adapter`: a LoRA adapter of PEFT that a training goes on with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.adapter_directory import CONFIG, WEIGHTS
from shared.checkpoint.directory.manifest import Manifest, misfit, read_manifest
from shared.checkpoint.directory.open import Checkpoint, verify_content
from shared.checkpoint.directory.peft_config import AdapterConfig
from shared.checkpoint.formats.safetensors_file import read_header
from shared.errors import UserError
from shared.families import registry
from shared.mapping.adapters import (
    ALL_LINEAR,
    PEFT_PREFIX,
    AdaptedMatrix,
    LoraSettings,
    adapted_linears,
    peft_shapes,
)
from shared.mapping.layout import Shape
from shared.mapping.rule import Table

if TYPE_CHECKING:
    import torch

FLAG = "--adapter"


@dataclass(frozen=True, kw_only=True)
class ContinuedAdapter:
    """A directory with an adapter of which every A and B has its place in the model."""

    path: Path
    settings: LoraSettings
    manifest: Manifest | None = field(repr=False)  # None: PEFT's own

    @classmethod
    def open(cls, path: Path, architecture: Architecture) -> ContinuedAdapter:
        """Read settings and headers.

        Raises:
            UserError: no adapter, one of another model, or one that trains more than A and B of whole kinds of matrices.
        """
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise UserError(
                    f"{FLAG} {path} has no {name}; give a directory of PEFT's save_pretrained or of `convert to-hf --base`"
                )
        manifest = read_manifest(path, flag=FLAG)
        if manifest and (found := misfit(path, manifest.files)):
            raise UserError(f"{FLAG} {found}, though its manifest lists it; publish the adapter again")
        config, table = AdapterConfig(path), registry.table_of(architecture)
        if more := config.trains_more:
            raise UserError(
                f"{FLAG} {path}: {more} of {CONFIG} is not trained here; merge the adapter with `convert merge-lora`, and train "
                "a new one on the result"
            )
        rank, alpha, rslora = config.rank_and_alpha
        held = {tensor.name: tensor.shape for tensor in read_header(path / WEIGHTS).tensors}
        targets = _targets(config, held, table)
        of_experts = any(matrix.expert is not None for matrix in _matrices(table, targets))
        if of_experts and config.experts_swapped("it adapts experts"):
            raise UserError(
                f"{FLAG} {path}: PEFT before 0.19 swapped the sides of experts; merge it with `convert merge-lora`, and train "
                "a new one on the result"
            )
        _check(path, held, peft_shapes(adapted_linears(table, targets), rank))
        settings = LoraSettings(rank=rank, alpha=alpha, rslora=rslora, dropout=config.dropout, targets=targets)
        return cls(path=path, settings=settings, manifest=manifest)

    def verify(self) -> None:
        """Compare every file with its hash, if a manifest has them. UserError names a damaged file."""
        verify_content(Checkpoint(path=self.path, kind="adapter", manifest=self.manifest), flag=FLAG)

    def relation_to(self, source: Checkpoint) -> str:
        """Whether the adapter was trained on this base, in words."""
        if self.manifest is None:
            return "of PEFT: whether it was trained on this base, nothing says"
        bases = {parent.fingerprint for parent in self.manifest.parents if parent.flag == "base"}
        own = {parent.fingerprint for parent in source.manifest.parents} if source.manifest else set()
        return "trained on this base" if bases & own else "trained on another base, or another conversion of this one"

    def tensors(self) -> dict[str, torch.Tensor]:
        """A and B by PEFT's names. UserError for one that is not finite."""
        from safetensors.torch import load_file

        tensors = load_file(self.path / WEIGHTS)
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{FLAG} {self.path}: {name} has NaN or infinity; train the adapter again")
        return tensors


def _matrices(table: Table, targets: tuple[str, ...]) -> list[AdaptedMatrix]:
    return [matrix for linear in adapted_linears(table, targets).values() for matrix in linear.matrices]


def _targets(config: AdapterConfig, held: dict[str, Shape], table: Table) -> tuple[str, ...]:
    """The kinds of matrices with an adapter, by their names within a layer: self_attn.q_proj."""
    found = set()
    for matrix in _matrices(table, (ALL_LINEAR,)):
        of_expert = matrix.expert is not None
        if config.parameter(matrix.name) if of_expert else f"{PEFT_PREFIX}{matrix.name}.lora_A.weight" in held:
            found.add(re.split(r"\.\d+\.", matrix.name)[-1])
    if not found:
        raise UserError(f"{FLAG} {config.path.parent} has no adapter of a linear layer of this model; give --lora-rank")
    return tuple(sorted(found))


def _check(path: Path, held: dict[str, Shape], wanted: dict[str, Shape]) -> None:
    """UserError unless the adapter has exactly these tensors."""
    for name in sorted(held.keys() | wanted.keys()):
        if name not in held:
            raise UserError(
                f"{FLAG} {path} has no {name}, and others of its kind; adapters of some layers are not trained here"
            )
        if name not in wanted:
            raise UserError(f"{FLAG} {path}: {name} fits no linear layer of the model of --source")
        if held[name] != wanted[name]:
            raise UserError(
                f"{FLAG} {path}: {name} is {list(held[name])}, the model of --source asks for {list(wanted[name])}"
            )
