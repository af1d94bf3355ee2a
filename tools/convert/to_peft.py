"""`convert to-hf` of a run with LoRA: its adapters as a PEFT directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.adapter_directory import CONFIG, FACT, WEIGHTS, is_base
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.model_card import Stage, write_adapter_card
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.dtypes import Dtype
from shared.checkpoint.formats.hugging_face import default_layout, write_weights
from shared.checkpoint.formats.torch_dist_reader import NON_WEIGHT_PREFIXES, TorchDistReader
from shared.checkpoint.lora.peft_files import TOKENIZER_FILES, adapter_config
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from shared.mapping.adapters import LoraSettings, adapted_linears, adapter_copies, peft_names, peft_shapes
from shared.mapping.rule import Table

if TYPE_CHECKING:
    import numpy as np


def publish_adapter(
    source: Path, target: Path, base: Path, refused: Mapping[str, Any], overwrite: bool, iteration: int | None
) -> None:
    """Convert; publishes `target` of kind adapter. `refused`: options of `to-hf` that are for weights of a model."""
    if flag := next((name for name, value in refused.items() if value), None):
        raise UserError(
            f"--{flag} is for weights of a model, --base for the adapters of a run with LoRA; leave one out"
        )
    with publish(target, kind="adapter", inputs={"source": source, "base": base}, overwrite=overwrite) as out:
        run = open_checkpoint(
            source, kinds=("megatron",), flag="--source", verify="sizes", iteration=iteration, adapters=True
        )
        if FACT not in run.facts:
            raise UserError(f"--base: --source {source} is no run with LoRA; leave --base out")
        verify_content(run, flag="--source")
        settings, table = settings_of(run), table_of(run)
        _check_base(run, base)
        tensors, dtype = adapter_tensors(run, settings, table)
        layout = default_layout(
            [(name, dtype.safetensors, tensor.shape) for name, tensor in sorted(tensors.items())], file=WEIGHTS
        )
        write_weights(
            out.path,
            layout,
            lambda tensor: [memoryview(tensors[tensor.name].tobytes())],
            out.record_hash,
        )
        relative = os.path.relpath(base.resolve(), target.resolve())
        config = adapter_config(settings, table, relative)
        (out.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (run.hf_files / name).is_file():
                shutil.copyfile(run.hf_files / name, out.path / name)
        write_adapter_card(out.path, Stage.of_run(run.manifest), name=target.name, base=base, link=relative)
        parameters = sum(tensor.size for tensor in tensors.values())
        out.describe(
            family=run.facts["family"],
            dtype=[dtype.safetensors],
            tensors=len(tensors),
            parameters=parameters,
            iteration=run.iteration_path.name,
        )
        log(f"{target}: {len(tensors)} tensors of rank {settings.rank}, {parameters:,} parameters; base {relative}")


def settings_of(run: Checkpoint) -> LoraSettings:
    """The settings of a run's adapters."""
    given = run.facts[FACT]
    return LoraSettings(
        rank=given["rank"],
        alpha=given["alpha"],
        rslora=given["rslora"],
        dropout=given["dropout"],
        targets=tuple(given["targets"]),
    )


def table_of(run: Checkpoint) -> Table:
    """The tensor table of a run's base."""
    return registry.table_of(registry.from_files(run.hf_files))


def adapter_tensors(run: Checkpoint, settings: LoraSettings, table: Table) -> tuple[dict[str, np.ndarray], Dtype]:
    """The tensors of adapter_model.safetensors, as unsigned integers of the dtype's bits, and their dtype.

    Raises:
        UserError: the iteration has other tensors than the run's settings ask for.
    """
    import numpy as np

    reader, linears = TorchDistReader(run.iteration_path), adapted_linears(table, settings.targets)
    wanted = {key: shape for linear in linears.values() for key, shape in linear.tensors(settings.rank).items()}
    found = {key: each.shape for key, each in reader.tensors.items() if not key.startswith(NON_WEIGHT_PREFIXES)}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise UserError(
                f"{run.iteration_path}: {key} is {found.get(key, 'missing')}, the run's LoRA settings ask for "
                f"{wanted.get(key, 'none')}; restore the run directory"
            )
    dtype = next(reader.tensors[key].dtype for key in wanted)
    number = np.dtype(f"u{dtype.size}")
    names = peft_names(linears)
    made = {name: np.zeros(shape, number) for name, shape in peft_shapes(linears, settings.rank).items()}
    for linear in linears.values():
        held = {}
        for key, shape in linear.tensors(settings.rank).items():
            rows = b"".join(map(bytes, reader.rows(key, linear.index, 0, shape[-2])))
            held[key] = np.frombuffer(rows, number).reshape(shape[-2:])
        for copy in adapter_copies(linear, names, settings.rank):
            made[copy.peft][copy.block] = held[f"{linear.key}.{copy.tensor}"][copy.rows]
    return made, dtype


def _check_base(run: Checkpoint, base: Path) -> None:
    """UserError if a directory holds another model than the run's base; a notice if only its content cannot be told."""
    if not (base / "config.json").is_file():
        raise UserError(f"--base {base} has no config.json; give the Hugging Face directory of the run's base")
    own, given = (read_config(directory / "config.json") for directory in (run.hf_files, base))
    if registry.from_config(own) != registry.from_config(given):
        raise UserError(
            f"--base {base} is another model than the run's base: their config.json differ; give the Hugging Face directory "
            "that the base was converted from, or `convert to-hf` of the base"
        )
    if not is_base(base, run.facts[FACT]["base"]):
        log(f"--base {base}: config.json is the base's; whether its weights are, no manifest says")
