"""`convert init`: a Hugging Face checkpoint with random weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from shared.architecture.architecture import Architecture
from shared.checkpoint.copy.blocks import BLOCK
from shared.checkpoint.copy.worker_pool import Advance
from shared.checkpoint.directory.auxiliary_files import (
    check_auxiliary_files,
    copy_auxiliary_files,
    for_transformers_4_and_5,
    read_config,
)
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.dtypes import BY_FLAG, FP32, Dtype, from_float32
from shared.checkpoint.formats.hugging_face import default_layout, write_weights
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.cli import log, progress
from shared.errors import UserError
from shared.families import registry
from shared.precision import Precision
from tools.convert.conversion_report import peak_memory, plan_line, result_line
from tools.convert.hf_source import ignored_fact
from tools.convert.quantization_fields import without_quantization
from tools.convert.tokenizer_files import tokenizer_fields


def run(
    target: Path,
    size: str | None,
    model_config: Path | None,
    tokenizer: Path | None,
    max_position_embeddings: int | None,
    ignore_config_field: tuple[str, ...],
    dtype: Precision,
    seed: int,
    overwrite: bool,
) -> None:
    """Initialise; publishes `target` of kind hf."""
    if (size is None) == (model_config is None):
        raise UserError("give either --size NAME or --model-config FILE")
    given = {"model_config": model_config, "tokenizer": tokenizer}
    inputs = {name: path for name, path in given.items() if path is not None}
    kind = BY_FLAG[dtype]
    if ignore_config_field and model_config is None:
        raise UserError("--ignore-config-field belongs to --model-config; leave it out")
    changes: dict[str, Any] = {"max_position_embeddings": max_position_embeddings} if max_position_embeddings else {}
    tokens: dict[str, Any] = {}
    quantization: list[str] = []
    if tokenizer is not None:
        check_auxiliary_files(tokenizer, "--tokenizer")
        tokens = tokenizer_fields(tokenizer)
        changes["vocab_size"] = tokens.pop("vocab_size")
    types = {"dtype": kind.name, "torch_dtype": kind.name}
    if model_config is not None:
        read, quantization = without_quantization(read_config(model_config))
        given_config = registry.with_auxiliary_fields(read, tokenizer or model_config.parent)
        registry.check_ignored(given_config, ignore_config_field)
        registry.from_config(given_config, ignore_config_field)
        config = for_transformers_4_and_5(given_config | changes | tokens | types)
    else:
        config = registry.to_config(replace(_named(str(size)), **changes), **tokens, **types)
    architecture = registry.from_config(config, ignore_config_field)
    ignored = ignored_fact(ignore_config_field)

    table = registry.table_of(architecture)
    if kept := table.required_pass_through():
        raise UserError(
            f"init writes language models only, {architecture.family} has {len(kept)} tensors of a multimodal wrapper "
            f"({min(kept)}, ...); give a --size or the config.json of its language model"
        )
    entries = table.entries()
    sources = list({source.name: source for entry in entries for source in entry.sources}.values())
    kinds = {source.name: FP32 if source.fp32 else kind for source in sources}
    layout = default_layout(
        sorted((source.name, kinds[source.name].safetensors, source.stored_shape) for source in sources)
    )
    total = sum(tensor.size for tensor in layout.tensors().values())
    with publish(target, kind="hf", inputs=inputs, overwrite=overwrite) as out:
        if quantization:
            log(f"config.json: {', '.join(quantization)} left out, the weights are {kind.name}, not quantised")
        log(plan_line("init", architecture, len(layout.shards), total, 1, peak_memory(1, transposes=False, casts=True)))
        started = time.monotonic()
        with progress(total, "bytes", "initialising weights") as advance:
            values = _initializer(architecture, kinds, seed)
            write_weights(out.path, layout, lambda tensor: counted(values(tensor), advance), out.record_hash)
        _write_files(out.path, config, tokenizer)
        out.describe(
            family=architecture.family,
            architecture=architecture.to_dict(),
            dtype=sorted({found.name for found in kinds.values()}),
            tensors=len(sources),
            parameters=architecture.parameter_count(),
            **ignored,
        )
        log(result_line(target, total, time.monotonic() - started))


def _named(size: str) -> Architecture:
    sizes = registry.sizes()
    if size not in sizes:
        near = get_close_matches(size, sizes, n=1, cutoff=0.3)
        raise UserError(
            f"--size {size} is not known{f'; did you mean {near[0]}?' if near else ''} (known: {', '.join(sizes)})"
        )
    return sizes[size]


def _initializer(
    architecture: Architecture, dtypes: Mapping[str, Dtype], seed: int
) -> Callable[[TensorInfo], Iterator[memoryview]]:
    """transformers' initialisation: norms 1, biases 0, weights mostly normal(0, initializer_range).

    Each tensor has its own generator, seeded by the tensor's name: its values do not depend on other tensors.
    """

    entries = list(registry.table_of(architecture).entries())
    of = {source.name: entry for entry in entries for source in entry.sources}
    init = {source.name: source.init for entry in entries for source in entry.sources}
    norms = {name for name, entry in of.items() if "norm" in entry.key and entry.key.endswith("weight")}

    def values_of(tensor: TensorInfo) -> Iterator[memoryview]:
        name, dtype = tensor.name, dtypes[tensor.name]
        rest = tensor.size // dtype.size
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
        while rest:
            count = min(rest, BLOCK // 4)
            if init[name] == "one":
                values = np.ones(count, dtype=np.float32)
            elif init[name] == "log":
                values = np.log(generator.uniform(0.01, 16.0, count)).astype(np.float32)
            elif name in norms:  # zero-centred gamma (Gemma): the tensor holds weight - 1
                stored_zero_centered = (
                    architecture.layers[0].norm.zero_centered_gamma and not of[name].zero_centered_gamma
                )
                values = np.full(count, 0.0 if stored_zero_centered else 1.0, dtype=np.float32)
            elif name.endswith("bias") and init[name] == "usual":
                values = np.zeros(count, dtype=np.float32)
            else:
                values = generator.standard_normal(count, dtype=np.float32)
                values *= np.float32(architecture.initializer_range)
            yield from_float32(values, dtype)
            rest -= count

    return values_of


def counted(blocks: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    """Yield the blocks and report their bytes to `advance`."""
    for block in blocks:
        yield block
        advance(len(block))


def _write_files(directory: Path, config: dict[str, Any], tokenizer: Path | None) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is None:
        return
    copy_auxiliary_files(tokenizer, directory)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    if not (directory / "generation_config.json").exists() and special:
        (directory / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
