"""Inputs of a run and its plan, printed before long work begins."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.architecture.architecture import Architecture, MoE
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.console import log, quantity
from shared.errors import UserError
from shared.families import registry
from shared.runtime.launch import started_by_launch
from shared.training.config import TrainingConfig

_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The two directories a training run reads."""

    source: Checkpoint
    data: Checkpoint
    architecture: Architecture

    @classmethod
    def open(
        cls, source: Path, data: Path, *, data_format: Literal["indexed", "packed"], iteration: int | None = None
    ) -> Inputs:
        """Open both and check that they fit each other. `verify` checks their contents later: it takes long.

        `iteration`: of the source, a run directory; None: the newest.
        """
        model = open_checkpoint(source, kinds=("megatron",), flag="--source", verify="sizes", iteration=iteration)
        dataset = open_checkpoint(data, kinds=("dataset",), flag="--data", verify="sizes")
        if dataset.facts.get("format") != data_format:
            tool = {"indexed": "pretrain", "packed": "sft"}[data_format]
            raise UserError(
                f"--data {data} holds a {dataset.facts.get('format')} dataset; make one with `{tool} prepare`"
            )
        architecture = _architecture(model)
        vocabulary = dataset.facts["vocab_size"]
        if vocabulary > architecture.vocab_size:
            raise UserError(
                f"--data {data} has token ids below {vocabulary} and the model of --source {source} only "
                f"{architecture.vocab_size}; prepare the data with the model's tokenizer"
            )
        if _tokenizers_differ(model.hf_files / "tokenizer.json", dataset.hf_files / "tokenizer.json"):
            raise UserError(
                f"--data {data} was made with another tokenizer than the model of --source {source} has; "
                f"prepare it with --tokenizer {model.hf_files}"
            )
        return cls(source=model, data=dataset, architecture=architecture)

    def verify(self) -> None:
        """Compare every file with its hash, once in a job: in the launcher, else on rank 0. UserError names a damaged file."""
        if not started_by_launch() and os.environ.get("RANK", "0") == "0":
            verify_content(self.source, flag="--source")
            verify_content(self.data, flag="--data")

    def split(self, name: str) -> dict[str, Any] | None:
        """Facts of a split of the dataset; None if it has no such split."""
        return self.data.facts["splits"].get(name)


def _tokenizers_differ(one: Path, other: Path) -> bool:
    """Whether both tokenizer.json exist and give different ids: vocabulary and rules are compared, not formatting."""
    if not (one.is_file() and other.is_file()) or one.read_bytes() == other.read_bytes():
        return False
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
    return any(first.get(part) != second.get(part) for part in ("model", "added_tokens", "pre_tokenizer", "normalizer"))


def _architecture(model: Checkpoint) -> Architecture:
    if not (model.hf_files / "config.json").is_file():
        raise UserError(
            f"--source {model.path} has no hf/config.json that says what the model is; "
            "make it with `convert to-megatron`"
        )
    architecture = registry.from_files(model.hf_files)
    if not architecture.mtp_depth:
        return architecture
    return registry.drop_missing_mtp(architecture, TorchDistReader(model.iteration_path).tensors)


def default_processes(needed: int) -> int:
    """One per GPU of this machine; without GPUs, the `needed` of the layout. Under torchrun or Slurm, WORLD_SIZE."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return visible_gpus() or needed


def visible_gpus() -> int:
    """GPUs this process may use, found without importing torch."""
    devices = len([node for node in Path("/dev").glob("nvidia*") if node.name.removeprefix("nvidia").isdigit()])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if chosen is None else min(devices, len([part for part in chosen.split(",") if part]))


def memory_estimate(config: TrainingConfig, architecture: Architecture) -> int:
    """Approximate bytes per rank: weights, fp32 gradients, AdamW, activations and logits.

    Activations follow Korthikanti et al. (arXiv:2205.05198), s sequence, b micro batch, h hidden size, in 16 bits:
    `34 s b h` bytes per layer without attention scores. Full recomputation: `2 s b h` per layer, and one whole layer.
    """
    width = _BYTES[config.precision]
    parallel = config.parallel
    experts = sum(
        layer.mlp.experts * layer.mlp.expert.parameter_count(architecture.hidden_size)
        for layer in architecture.layers
        if isinstance(layer.mlp, MoE)
    )
    dense = architecture.parameter_count() + architecture.mtp_parameter_count() - experts
    weights = dense / parallel.tensor / parallel.pipeline + experts / (
        parallel.etp * parallel.expert * parallel.pipeline
    )
    main = 4 if config.precision == "bf16" else 0  # fp32 weights are their own main copy
    states = weights * (width + 4 + (8 + main) / (parallel.data * parallel.context))
    tokens = config.micro_batch_size * config.sequence_length / parallel.context
    layers = architecture.num_layers / parallel.pipeline
    in_flight = parallel.pipeline  # micro batches of the first stage
    layer = 34 * tokens * architecture.hidden_size * width / 2 / parallel.tensor
    kept = (
        2 * tokens * architecture.hidden_size * width / 2 * layers + layer
        if "full" in config.recompute
        else layer * layers
    )
    logits = 3 * 4 * tokens * architecture.padded_vocab_size(parallel.tensor) / parallel.tensor
    return int(states + kept * in_flight + logits)


def announce(config: TrainingConfig, inputs: Inputs, *, sequences: int) -> None:
    """Print the plan. `sequences`: per epoch."""
    architecture = inputs.architecture
    parameters = architecture.parameter_count() + architecture.mtp_parameter_count()
    layout, processes = str(config.parallel), config.parallel.processes
    epochs = config.steps * config.global_batch_size / sequences
    width = _BYTES[config.precision]
    log(
        f"model       {architecture.family}, {parameters / 1e6:,.1f} M parameters, {architecture.num_layers} layers of "
        f"{architecture.hidden_size}, vocabulary {architecture.vocab_size}, {config.precision}"
    )
    log(f"layout      {processes} process{'es' * (processes > 1)}{': ' + layout if layout else ''}")
    log(
        f"update      {config.global_batch_size} sequences of {config.sequence_length} = {config.tokens_per_step:,} "
        f"tokens, in {config.micro_batches} micro batch{'es' * (config.micro_batches > 1)} of {config.micro_batch_size} per rank"
    )
    log(
        f"run         {config.steps:,} updates = {config.steps * config.tokens_per_step:,} tokens = {epochs:.2f} epochs; "
        f"{_rates(config)}"
    )
    if count := architecture.mtp_depth:
        factor = config.mtp_loss_scaling_factor
        how = f"trained, loss times {factor:g}" if factor else "frozen (--mtp-loss-scaling-factor 0)"
        log(f"mtp         {count} layer{'s' * (count > 1)}, {how}")
    elif registry.from_files(inputs.source.hf_files).mtp:
        log("mtp         off (config.json declares MTP layers, the checkpoint has none)")
    if rates := registry.unread_rates(read_config(inputs.source.hf_files / "config.json")):
        named = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        log(f"dropout     not used: {named} of config.json, the model here has none there")
    log(
        f"needs       about {quantity(memory_estimate(config, architecture), 'bytes')} of memory per process, "
        f"{quantity(parameters * (width + 12), 'bytes')} of disk per checkpoint, {config.keep} kept"
    )


def _rates(config: TrainingConfig) -> str:
    """The learning rate over the run, in words."""
    peak = f"learning rate {config.learning_rate:g} after {config.warmup_steps} updates"
    if config.schedule == "constant":
        return peak
    over = f"over the last {config.decay_steps}" if config.schedule == "wsd" else "as a cosine"
    return f"{peak}, to {config.min_learning_rate:g} {over}"
