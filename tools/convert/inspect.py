"""`convert inspect`: description of a checkpoint directory, from its headers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shared.architecture import dictionary
from shared.checkpoint.directory.adapter_directory import FACT, base_state
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint
from shared.checkpoint.dtypes import BY_SAFETENSORS, count_not_finite
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.checkpoint.formats.transformer_engine_reader import LAYERS, TeReader
from shared.cli import log, progress
from shared.console import quantity
from shared.errors import StageError, UserError
from shared.families import registry
from shared.mapping.account import account_sources, account_targets
from shared.mapping.layout import Shape
from shared.mapping.transformer_engine import te_form
from tools.convert.architecture_summary import architecture_lines
from tools.convert.hf_files import match_pass_through, original_scheme
from tools.convert.to_peft import adapter_tensors, settings_of, table_of
from tools.convert.to_te import layer_lines

Reader = HfReader | TorchDistReader | TeReader


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor."""

    name: str
    dtype: str  # torch's name
    shape: Shape


def run(source: Path, tensors: bool, scan: bool, as_json: bool) -> None:
    """Print the description. With `scan`, read every weight; StageError if one is not finite."""
    checkpoint = open_checkpoint(source, kinds=("hf", "megatron", "te"), flag="--source", verify="sizes", adapters=True)
    reader = _reader(checkpoint)
    rows = _rows(reader)
    found = _describe(checkpoint, reader, rows)
    not_finite = _scan(reader) if scan else {}
    if scan:
        found["not_finite"] = not_finite
    if tensors:
        found["tensor_list"] = {row.name: {"dtype": row.dtype, "shape": list(row.shape)} for row in rows}
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, rows if tensors else [])
    if not_finite:
        name, what = next(iter(not_finite.items()))
        raise StageError(f"{source}: {name} holds {what} ({len(not_finite)} tensors are not finite)")


def _reader(checkpoint: Checkpoint) -> Reader:
    if checkpoint.kind == "hf":
        return HfReader(checkpoint.path)
    return TeReader(checkpoint.path) if checkpoint.kind == "te" else TorchDistReader(checkpoint.iteration_path)


def _rows(reader: Reader) -> list[Row]:
    if isinstance(reader, HfReader):
        named = {code: dtype.name for code, dtype in BY_SAFETENSORS.items()}
        return [Row(name=t.name, dtype=named.get(t.dtype, t.dtype), shape=t.shape) for t in reader.tensors.values()]
    return [Row(name=t.key, dtype=t.dtype.name, shape=t.shape) for t in reader.tensors.values()]


def _describe(checkpoint: Checkpoint, reader: Reader, rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(checkpoint.path), "kind": checkpoint.kind}
    types: Counter[str] = Counter()
    for row in rows:
        types[row.dtype] += prod(row.shape)
    found |= {"tensors": len(rows), "numbers": dict(types), "weight_bytes": reader.bytes}
    if isinstance(reader, TorchDistReader):
        found["iteration"] = checkpoint.iteration_path.name
        found["chunks"] = sum(len(tensor.chunks) for tensor in reader.tensors.values())
        found["optimizer_tensors"] = len(reader.non_weights)
    elif isinstance(reader, TeReader):
        found["layers"] = layer_lines(read_config(checkpoint.path / LAYERS)["layers"])
    else:
        found["shards"] = len(reader.layout.shards)
    found |= _family(checkpoint, reader)
    manifest = checkpoint.manifest
    if manifest is not None:
        found["made_by"] = f"{manifest.tool} {manifest.command} {manifest.version}"
        found["created"] = manifest.created
        found["state"] = manifest.state
        found["parents"] = [f"{p.flag}: {p.name} ({p.fingerprint})" for p in manifest.parents]
    else:
        bridge = checkpoint.kind == "megatron" and (checkpoint.iteration_path / "run_config.yaml").is_file()
        found["made_by"] = f"{'Megatron-Bridge' if bridge else 'another program'} (no manifest.json)"
    return found


def _family(checkpoint: Checkpoint, reader: Reader) -> dict[str, Any]:
    """Family, architecture and tensor account; an error is reported as `problem`."""
    path = checkpoint.hf_files / "config.json"
    if not path.is_file():
        return {"family": None, "problem": f"{path} is missing"}
    config = read_config(path)
    result: dict[str, Any] = {"family": config.get("model_type")}
    try:
        if form := reader.scheme if isinstance(reader, HfReader) else original_scheme(path.parent):
            result["quantization"] = form.title
            if isinstance(reader, HfReader):
                result["quantized_weights"] = sum(weight.quantized is not None for weight in reader.weights.values())
        architecture = registry.from_files(path.parent)
        if not isinstance(reader, TeReader):  # MTP layers are pass-through tensors there
            architecture = registry.drop_missing_mtp(
                architecture, reader.weights if isinstance(reader, HfReader) else reader.tensors
            )
        result["family"] = architecture.family
        if FACT in checkpoint.facts:
            return result | _adapter(checkpoint)
        result |= {"parameters": architecture.parameter_count(), "architecture": architecture.to_dict()}
        table = registry.table_of(architecture)
        if isinstance(reader, HfReader):
            account_sources(table, reader.weights, str(checkpoint.path))
        elif isinstance(reader, TeReader):
            account_targets(te_form(table, architecture).table, reader.tensors, str(checkpoint.path))
        else:
            account_targets(table, reader.tensors, str(checkpoint.path))
        if not isinstance(reader, HfReader):
            match_pass_through(table, path.parent)
    except UserError as error:
        result["problem"] = str(error)
    return result


def _adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run with LoRA holds. UserError if its tensors are not those of its settings."""
    settings = settings_of(checkpoint)
    adapter_tensors(checkpoint, settings, table_of(checkpoint))
    how = ", rank-stabilised" if settings.rslora else ""
    return {
        "adapter": f"rank {settings.rank}, alpha {settings.alpha:g}{how}, targets {', '.join(settings.targets)}",
        "base": base_state(checkpoint.path, checkpoint.facts[FACT]["base"]),
    }


def _scan(reader: Reader) -> dict[str, str]:
    """Tensors with NaN or infinity."""
    found: dict[str, list[int]] = {}
    if isinstance(reader, HfReader):
        size = sum(weight.tensor.size for weight in reader.weights.values())
        weights = [(w.name, BY_SAFETENSORS.get(w.dtype), reader.values(w.name)) for w in reader.weights.values()]
    else:
        size = reader.bytes
        weights = [
            (key, tensor.dtype, reader.rows(key, (), 0, tensor.shape[0])) for key, tensor in reader.tensors.items()
        ]
    with progress(size, "bytes", "scanning") as advance:
        for name, dtype, blocks in weights:
            if dtype is None:
                log(f"{name}: not scanned, its dtype is no floating point")
                continue
            for block in blocks:
                nan, infinite = count_not_finite(block, dtype)
                if nan or infinite:
                    counts = found.setdefault(name, [0, 0])
                    counts[0], counts[1] = counts[0] + nan, counts[1] + infinite
                advance(len(block))
    return {name: f"{nan} NaN, {infinite} infinite" for name, (nan, infinite) in found.items()}


def _print(found: dict[str, Any], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if name == "tensor_list":
            continue
        if name == "numbers":
            value = ", ".join(f"{count:,} {dtype}" for dtype, count in value.items())
        elif name == "weight_bytes":
            value = quantity(value, "bytes")
        elif name == "architecture":
            value = "\n".join(architecture_lines(dictionary.read(value)))
        elif isinstance(value, list | dict):
            value = "\n".join(map(str, value if isinstance(value, list) else value.items())) or "none"
        elif name == "parameters":
            value = f"{value:,}"
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    if rows:
        listing = Table("tensor", "dtype", "shape", box=None)
        for row in rows:
            listing.add_row(row.name, row.dtype, str(list(row.shape)))
        console.print(listing)
