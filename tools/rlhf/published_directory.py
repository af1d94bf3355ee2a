"""Writes the Hugging Face directory that a command publishes: every tensor and field of the source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.checkpoint.directory.auxiliary_files import finish_hf_directory, read_config
from shared.checkpoint.dtypes import BY_SAFETENSORS
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.safetensors_file import encode_header, header_bytes
from shared.console import log
from shared.errors import StageError
from shared.weight_account import tied_copies
from tools.rlhf.models import Source

# Fields of a sequence classifier's config.json; the others are the source's.
_CLASSIFIER_FIELDS = ("architectures", "id2label", "label2id", "pad_token_id")


def log_aside(source: Source) -> None:
    """Say which tensors are not trained and published as they are."""
    if source.aside:
        count = "1 tensor" if len(source.aside) == 1 else f"{len(source.aside)} tensors"
        log(f"kept      {count} that {source.kind.__name__} does not hold, published unchanged: {source.aside[0]} ...")


def save_hf(
    model: Any,
    directory: Path,
    source: Source,
    *,
    weights: dict[str, Tensor] | None = None,
    classifier: bool = False,
    replaced: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face directory with the source's auxiliary files, tensor names, dtypes and tensors aside.

    Args:
        model: a transformers model; its weights are written unless `weights` is given.
        directory: the output directory.
        source: the initial model's directory.
        weights: unsharded tensors by name; by default the model's state dict.
        classifier: config.json gets the model's fields of a sequence classifier; by default it is the source's.
        replaced: tensors under the source's names, in place of those of `weights`.

    Returns:
        manifest entries.
    """
    weights, tied = _source_weights(model, source, model.state_dict() if weights is None else weights)
    unchanged = sorted(set(source.aside) - set(weights))
    weights |= stored_tensors(HfReader(source.path), unchanged) | dict(replaced or {})
    count = len(weights)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name not in tied)
    model.config.dtype = source.dtype
    model.save_pretrained(directory, state_dict=weights, save_original_format=False)
    # It has training's sampling settings; the source's file is copied instead.
    (directory / "generation_config.json").unlink(missing_ok=True)
    _write_config(directory / "config.json", source, classifier)
    finish_hf_directory(directory, source.path)
    return {
        "family": model.config.model_type,
        "architecture": type(model).__name__,
        "dtype": str(source.dtype).removeprefix("torch."),
        "tensors": count,
        "parameters": parameters,
        "tensors_unchanged": unchanged,
    }


def source_weights(model: Any, source: Source, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights under the names and in the dtypes of the source, with its tensors aside.

    Args:
        model: the transformers model.
        source: the initial model's directory.
        weights: the model's unsharded state dict.
    """
    weights, _ = _source_weights(model, source, weights)
    return weights | stored_tensors(HfReader(source.path), sorted(set(source.aside) - set(weights)))


def _source_weights(model: Any, source: Source, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `source_weights`, without tensors aside that are as they were; and which tensor is tied to which."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise StageError(f"{name} is not finite after training; nothing is published. Lower --learning-rate")
    reader = HfReader(source.path)
    weights = _named_as_in_the_source(model, remove_tied_weights_from_state_dict(weights, model), reader)
    weights = {name: tensor.to(_dtype(name, tensor, reader, source)) for name, tensor in weights.items()}
    tied = model.all_tied_weights_keys | {n: of for n, of in tied_copies(source.path).items() if n in source.aside}
    for name, of in tied.items():
        if name in reader.tensors and name not in weights and of in weights:
            weights[name] = weights[of].clone()
    return weights, tied


def _named_as_in_the_source(model: Any, weights: dict[str, Tensor], reader: HfReader) -> dict[str, Tensor]:
    """State dict in the spelling and layout of the source: experts stacked or not, names with the body's prefix or without."""
    from transformers.core_model_loading import revert_weight_conversion

    layouts = [{_spelled(n, model, reader): t for n, t in weights.items()}]
    layouts += [{_spelled(n, model, reader): t for n, t in revert_weight_conversion(model, dict(weights)).items()}]
    return min(reversed(layouts), key=lambda layout: len(layout.keys() - reader.tensors.keys()))


def _spelled(name: str, model: Any, reader: HfReader) -> str:
    prefix = f"{model.base_model_prefix}."
    spellings = (name, name.removeprefix(prefix), prefix + name)
    return next((spelling for spelling in spellings if spelling in reader.tensors), name)


def _dtype(name: str, tensor: Tensor, reader: HfReader, source: Source) -> torch.dtype:
    """That of the source's tensor: routers' biases and decay rates may be fp32 in a bf16 model."""
    if not tensor.is_floating_point():
        return tensor.dtype
    stored = reader.tensors.get(name)
    known = BY_SAFETENSORS.get(stored.dtype) if stored is not None else None
    return source.dtype if known is None else getattr(torch, known.name)


def stored_tensors(reader: HfReader, names: Iterable[str]) -> dict[str, Tensor]:
    """Stored tensors, byte for byte."""
    from safetensors.torch import load

    tensors = [reader.tensors[name] for name in names]
    header = header_bytes(encode_header([(t.name, t.dtype, t.shape) for t in tensors], None))
    return load(header + b"".join(bytes(block) for t in tensors for block in reader.rows(t.name)))


def _write_config(path: Path, source: Source, classifier: bool) -> None:
    """config.json of a sequence classifier; that of a policy is the source's, which is copied."""
    theirs = read_config(path)
    path.unlink()
    if not classifier:
        return
    config = read_config(source.path / "config.json")
    config |= {name: theirs[name] for name in _CLASSIFIER_FIELDS if name in theirs}
    if "text_config" in config:
        config["text_config"] |= {"pad_token_id": source.pad_id}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
