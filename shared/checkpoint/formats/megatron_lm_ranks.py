"""Legacy Megatron-LM checkpoints: one torch.save file per rank, read without unpickling code.

`iter_0001000/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` holds a rank's state dict (`model`, or `model0`, `model1`, ... per
virtual pipeline stage), the run's arguments, and optimizer and RNG state. This module locates tensors; it reads no data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.formats.pytorch_bin import TorchFile
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError

FILES = ("model_optim_rng.pt", "model_rng.pt")  # second: with a distributed optimizer (in its own file)
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_NOT_WEIGHTS = ("_extra_state", "inv_freq")  # FP8 scales, RoPE constants


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank's file."""

    file: Path
    chunks: tuple[Mapping[str, TensorInfo], ...]  # per virtual pipeline stage: name -> tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All ranks of one iteration, and the parallel sizes."""

    tensor: int
    pipeline: int
    expert: int
    at: Mapping[tuple[int, int, int], Rank]  # by (tensor, pipeline, expert) parallel rank
    version: float  # checkpoint_version: decides the order of QKV rows
    arguments: Mapping[str, Any]  # Megatron-LM's `args`; empty if not stored


def rank_files(iteration: Path) -> list[Path]:
    """The per-rank files of an iteration; none in a torch_dist directory."""
    return sorted(path for name in FILES for path in iteration.glob(f"mp_rank_*/{name}"))


def read_ranks(iteration: Path) -> Ranks:
    """Locate every rank's tensors.

    Raises:
        UserError: a rank is missing or of another iteration; a file is damaged, or its pickle names unknown classes.
    """
    read = {}
    with OpenFiles() as files:
        for path in rank_files(iteration):
            read[path.parent.name] = (path, *_read(path, files))
    arguments = _arguments(next(iter(read.values()))[1])
    sizes = _sizes(arguments, list(read))
    places = [(t, p, e) for t, p, e in product(range(sizes[0]), range(sizes[1]), range(sizes[2]))]
    names = {place: _folder(place, sizes) for place in places}
    shown = "tensor x pipeline x expert parallel " + " x ".join(map(str, sizes))
    for name in names.values():
        if name not in read:
            raise UserError(f"{iteration / name} is missing: the checkpoint is {shown}; fetch it again")
    if unexpected := sorted(read.keys() - set(names.values())):
        raise UserError(f"{iteration / unexpected[0]} belongs to no rank: the checkpoint is {shown}; move it away")
    first, state, _ = read[names[0, 0, 0]]
    for path, other, _ in read.values():
        for field in ("iteration", "checkpoint_version"):
            if other.get(field) != state.get(field):
                raise UserError(
                    f"{path}: {field} is {other.get(field)}, in {first} {state.get(field)}; fetch both again"
                )
    return Ranks(
        tensor=sizes[0],
        pipeline=sizes[1],
        expert=sizes[2],
        at={place: Rank(file=read[name][0], chunks=read[name][2]) for place, name in names.items()},
        version=float(state.get("checkpoint_version", 0)),
        arguments=arguments,
    )


def _read(path: Path, files: OpenFiles) -> tuple[Mapping[str, Any], tuple[Mapping[str, TensorInfo], ...]]:
    file = TorchFile(path, training=True)
    state = file.content
    names = [name for name in state if re.fullmatch(r"model\d*", str(name))] if isinstance(state, Mapping) else []
    if not names:
        raise UserError(f"{path} has no `model`: not a Megatron-LM checkpoint")
    chunks = []
    for name in sorted(names, key=lambda name: int(name.removeprefix("model") or 0)):
        chunks.append({key: file.tensor(key, value, files) for key, value in _flat(state[name], "")})
    metadata = {field: state[field] for field in ("args", "iteration", "checkpoint_version") if field in state}
    return metadata, tuple(chunks)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Flatten nested state dicts to dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None and not name.endswith(_NOT_WEIGHTS):
        yield name, value


def _arguments(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(vars(state["args"])) if "args" in state else {}


def _sizes(arguments: Mapping[str, Any], folders: list[str]) -> tuple[int, int, int]:
    """Tensor, pipeline and expert parallel sizes, from the run's arguments or else from the folder names."""
    fields = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    sizes = [arguments.get(field) for field in fields]
    if sizes[0] is not None:
        return sizes[0], sizes[1] or 1, sizes[2] or 1
    found = [match for name in folders if (match := _FOLDER.fullmatch(name))]
    counts = [max((int(match[place] or 0) for match in found), default=0) + 1 for place in (1, 2, 3)]
    return counts[0], counts[1], counts[2]


def _folder(place: tuple[int, int, int], sizes: tuple[int, int, int]) -> str:
    """Megatron-LM's folder name: parallel dimensions of size 1 are left out, except tensor parallelism."""
    name = f"mp_rank_{place[0]:02d}"
    return name + "".join(f"_{rank:03d}" for rank, size in zip(place[1:], sizes[1:], strict=True) if size > 1)
