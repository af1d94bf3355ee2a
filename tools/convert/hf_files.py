"""`hf/` of a Megatron or TransformerEngine directory: auxiliary files, shard layout and pass-through tensors of the source.

`to-hf` needs them to write the source directory again, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path

from shared.checkpoint.directory.auxiliary_files import copy_auxiliary_files, read_config
from shared.checkpoint.directory.publish import Publication
from shared.checkpoint.formats.hugging_face import (
    LAYOUT,
    HfReader,
    WeightLayout,
    default_layout,
    scheme_of,
    write_weights,
)
from shared.checkpoint.formats.safetensors_file import TensorInfo, read_header
from shared.cli import log
from shared.console import abbreviated
from shared.errors import UserError
from shared.mapping.rule import Table
from shared.quantized.scheme import QuantizationScheme
from tools.convert.plan_import import ImportPlan
from tools.convert.quantization_fields import without_quantization

PASS_THROUGH_FILE = "asides.safetensors"


def pass_through_tensors(files: Path) -> dict[str, TensorInfo]:
    """Pass-through tensors stored in `files`, the directory of config.json."""
    path = files / PASS_THROUGH_FILE
    return {tensor.name: tensor for tensor in read_header(path).tensors} if path.is_file() else {}


def original_scheme(files: Path) -> QuantizationScheme | None:
    """The quantisation scheme of the checkpoint that hf/weights.json describes; None if its weights were plain."""
    layout = WeightLayout.read(files / LAYOUT).tensors() if (files / LAYOUT).is_file() else {}
    return scheme_of(read_config(files / "config.json"), layout)


def remove_quantization_config(path: Path) -> None:
    """Remove quantization_config from a config.json whose weights are not quantised, or no more."""
    config, removed = without_quantization(read_config(path))
    if removed:
        fields = ", ".join(removed)
        log(f"config.json: {fields} removed, the weights are not quantised (to-hf --quantized quantises again)")
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def match_pass_through(table: Table, files: Path) -> tuple[Table, dict[str, TensorInfo]]:
    """The tensor table with the names used in the model's files, and the pass-through tensors.

    Pass-through tensors are in hf/asides.safetensors, or among the weights if `files` is the model's Hugging Face directory.

    Raises:
        UserError: a required pass-through tensor (of a vision tower) is missing or misshapen.
    """
    tensors = pass_through_tensors(files)
    if (files / LAYOUT).is_file():
        table = table.with_names_of(WeightLayout.read(files / LAYOUT).tensors())
    elif table.required_pass_through():
        if not tensors:
            tensors = _of_model(table, files)
        table = table.with_names_of(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if name in table.pass_through_names()}
    kept = table.required_pass_through()
    if missing := sorted(kept.keys() - tensors.keys()):
        raise UserError(
            f"{files / PASS_THROUGH_FILE}: {abbreviated(missing)} missing, of the multimodal wrapper; restore hf/, or give "
            "--hf-files the model's Hugging Face directory with its weights"
        )
    for name, shape in kept.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{tensors[name].place}: {name} is {list(tensors[name].shape)}, config.json asks for {list(shape)}"
            )
    return table, tensors


def _of_model(table: Table, files: Path) -> dict[str, TensorInfo]:
    try:
        return HfReader(files, flag="--hf-files").tensors
    except UserError as error:
        raise UserError(
            f"{files} lacks {abbreviated(sorted(table.required_pass_through()))} of the multimodal wrapper; give --hf-files "
            f"the model's Hugging Face directory with its weights ({error})"
        ) from None


def write_hf_files(out: Publication, plan: ImportPlan, reader: HfReader) -> None:
    """Write `hf/`."""
    hf = out.path / "hf"
    hf.mkdir(exist_ok=True)
    for directory in reader.auxiliary_directories:
        copy_auxiliary_files(directory, hf)
    if not (hf / "config.json").is_file():
        (hf / "config.json").write_text(json.dumps(reader.config, indent=2) + "\n", encoding="utf-8")
    (hf / LAYOUT).write_text(reader.layout.encode(), encoding="utf-8")
    if kept := _kept(plan, reader):
        layout = default_layout([(tensor.name, tensor.dtype, tensor.shape) for tensor in kept], file=PASS_THROUGH_FILE)
        write_weights(
            hf, layout, lambda t: reader.rows(t.name), lambda name, digest: out.record_hash(f"hf/{name}", digest)
        )


def _kept(plan: ImportPlan, reader: HfReader) -> list[TensorInfo]:
    """Pass-through tensors and quantisation scales."""
    kept = [tensor for name in plan.account.pass_through for tensor in reader.weights[name].stored]
    scales = [
        tensor for weight in reader.weights.values() if weight.quantized for tensor in weight.quantized.companions
    ]
    return [*kept, *(tensor for tensor in scales if tensor not in kept)]
