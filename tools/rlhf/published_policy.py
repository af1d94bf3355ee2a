"""Publishes a trained policy: all weights, a LoRA adapter, or the source with the adapters merged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.checkpoint.directory.auxiliary_files import finish_hf_directory
from shared.checkpoint.directory.publish import Publication
from shared.checkpoint.formats.hugging_face import HfReader, RecordHash, write_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.options import Options
from tools.rlhf.published_directory import save_hf


def publish_policy(
    out: Publication,
    model: Any,
    source: Source,
    weights: dict[str, Tensor],
    adapters: Adapters | None,
    options: Options,
) -> dict[str, Any]:
    """Write what the command publishes; on rank 0.

    Args:
        out: the directory in the making.
        model: the trained model.
        source: the initial policy.
        weights: the unsharded trained weights.
        adapters: with LoRA.
        options: the command's.

    Returns:
        facts of the manifest.
    """
    return write_policy(
        out.path, model, source, weights, adapters, options, target=options.target, record=out.record_hash
    )


def write_policy(
    directory: Path,
    model: Any,
    source: Source,
    weights: dict[str, Tensor],
    adapters: Adapters | None,
    options: Options,
    *,
    target: Path,
    record: RecordHash = lambda name, digest: None,
) -> dict[str, Any]:
    """As `publish_policy`, into any directory.

    Args:
        directory: where to write.
        model: the trained model.
        source: the initial policy.
        weights: the unsharded trained weights.
        adapters: with LoRA.
        options: the command's.
        target: the directory when published, from which an adapter names its base.
        record: called with the names and hashes of files that are known when they are written.
    """
    if adapters is None:
        return save_hf(model, directory, source, weights=weights)
    tensors = adapters.tensors(model, weights)
    if options.publish == "merged":
        return _write_merged(directory, adapters, tensors, record) | lora_facts(adapters)
    return write_adapter(directory, adapters, tensors, target=target)


def write_adapter(directory: Path, adapters: Adapters, tensors: dict[str, Tensor], *, target: Path) -> dict[str, Any]:
    """Write a directory of PEFT, which is published as `target`; returns facts of the manifest."""
    adapters.write(directory, tensors, target=target)
    return {
        "family": adapters.source.config.model_type,
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    } | lora_facts(adapters)


def lora_facts(adapters: Adapters) -> dict[str, Any]:
    """What a manifest says of the adapters."""
    settings = adapters.settings
    return {
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "rslora": settings.rslora,
        "lora_targets": list(settings.targets),
    }


def _write_merged(
    directory: Path, adapters: Adapters, tensors: dict[str, Tensor], record: RecordHash
) -> dict[str, Any]:
    """Write the source's shards with the changed tensors; the others are copied byte for byte."""
    source = adapters.source
    reader, merged = HfReader(source.path), adapters.merged(tensors)

    def blocks(tensor: TensorInfo) -> Iterable[memoryview]:
        if tensor.name not in merged:
            return reader.rows(tensor.name)
        flat = merged[tensor.name].reshape(-1)
        return [memoryview(flat.view(torch.uint8).numpy())]

    write_weights(directory, reader.layout, blocks, record)
    finish_hf_directory(directory, source.path)
    return {
        "family": source.config.model_type,
        "architecture": source.kind.__name__,
        "dtype": str(source.dtype).removeprefix("torch."),
        "tensors": len(reader.tensors),
        "adapted": len(merged),
    }
