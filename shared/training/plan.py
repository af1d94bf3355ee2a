"""Inputs of a run and its plan, printed before long work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.console import log, quantity
from shared.errors import UserError
from shared.families import registry
from shared.mapping.adapters import LoraSettings, adapted_linears
from shared.runtime.launch import started_by_launch, visible_gpus
from shared.training import states
from shared.training.blend import Blend
from shared.training.config import TrainingConfig
from shared.training.continued_adapter import ContinuedAdapter
from shared.training.data_sources import DataSource, Format, open_data

_BYTES = {"bf16": 2, "fp32": 4}
_FORKED = (
    160 << 20
)  # bytes of the interpreter that a fork copies as training goes on; `make bench-save` measured 100 MB


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a training run reads: the model, and one or several sources of data."""

    source: Checkpoint
    data: tuple[DataSource, ...]
    architecture: Architecture
    tokenizer: Path | None = None  # `--tokenizer`, of plain Megatron pairs
    adapter: ContinuedAdapter | None = None  # `--adapter`

    @classmethod
    def open(
        cls,
        source: Path,
        data: Sequence[Path],
        *,
        data_format: Format,
        iteration: int | None = None,
        tokenizer: Path | None = None,
        adapter: Path | None = None,
    ) -> Inputs:
        """Open all and check that they fit each other. `verify` checks their contents later: it takes long.

        Args:
            source: a Megatron directory.
            data: of this format, or plain Megatron pairs.
            data_format: of `prepare`.
            iteration: of the source, a run directory; None: the newest.
            tokenizer: of plain Megatron pairs in `data`.
            adapter: a directory of PEFT, to go on with.
        """
        model = open_checkpoint(source, kinds=("megatron",), flag="--source", verify="sizes", iteration=iteration)
        sources = open_data(data, data_format=data_format, tokenizer=tokenizer)
        architecture = architecture_of(model)
        own = model.hf_files if (model.hf_files / "tokenizer.json").is_file() else sources[0].tokenizer
        for each in sources:
            if each.vocab_size > architecture.vocab_size:
                raise UserError(
                    f"--data {each.path} has token ids below {each.vocab_size} and the model of --source {source} only "
                    f"{architecture.vocab_size}; prepare the data with the model's tokenizer"
                )
            if _tokenizers_differ(own / "tokenizer.json", each.tokenizer / "tokenizer.json"):
                of = f"the model of --source {source}" if own == model.hf_files else f"--data {sources[0].path}"
                raise UserError(
                    f"--data {each.path} was made with another tokenizer than {of} has; prepare it with --tokenizer {own}"
                )
        continued = ContinuedAdapter.open(adapter, architecture) if adapter else None
        return cls(source=model, data=sources, architecture=architecture, tokenizer=tokenizer, adapter=continued)

    @property
    def lora(self) -> LoraSettings | None:
        """The settings of the adapter to go on with."""
        return self.adapter.settings if self.adapter else None

    def verify(self) -> None:
        """Compare every file with its hash, once in a job: in the launcher, else on rank 0. UserError names a damaged file."""
        if not started_by_launch() and os.environ.get("RANK", "0") == "0":
            verify_content(self.source, flag="--source")
            for source in self.data:
                source.verify()
            if self.adapter:
                self.adapter.verify()

    @property
    def parents(self) -> dict[str, Path | Sequence[Path]]:
        """Flag -> the paths given to it, as a manifest records them."""
        given: dict[str, Path | Sequence[Path]] = {
            "source": self.source.path,
            "data": [source.path for source in self.data],
        }
        given |= {"tokenizer": self.tokenizer} if self.tokenizer else {}
        return given | ({"adapter": self.adapter.path} if self.adapter else {})


def _tokenizers_differ(one: Path, other: Path) -> bool:
    """Whether both tokenizer.json exist and give different ids: vocabulary and rules are compared, not formatting."""
    if not (one.is_file() and other.is_file()) or one.read_bytes() == other.read_bytes():
        return False
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
    return any(first.get(part) != second.get(part) for part in ("model", "added_tokens", "pre_tokenizer", "normalizer"))


def architecture_of(model: Checkpoint) -> Architecture:
    """What a Megatron directory says its model is. UserError if it says nothing."""
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


def snapshot_estimate(config: TrainingConfig, architecture: Architecture) -> int:
    """Bytes on the host, at most, of the copy that an asynchronous save is written from.

    With GPUs: trained weights, and this rank's range of their fp32 copies and AdamW. Without, a fork shares memory until training
    changes it, which includes the fp32 gradients. And pages of the process itself, which are copied likewise.
    """
    held = states.fullest(config, architecture)
    return held.trained_weights + held.optimizer + (0 if visible_gpus() else held.gradients) + _FORKED


def adapter_parameters(lora: LoraSettings, architecture: Architecture) -> int:
    """Numbers in all adapters."""
    linears = adapted_linears(registry.table_of(architecture), lora.targets)
    return sum(linear.parameters(lora.rank) for linear in linears.values())


def _announce_lora(config: TrainingConfig, inputs: Inputs, parameters: int) -> None:
    """Print what is trained, and what a full training would need."""
    lora = config.lora
    assert lora is not None
    trained = adapter_parameters(lora, inputs.architecture)
    linears = adapted_linears(registry.table_of(inputs.architecture), lora.targets)
    if inputs.adapter:
        log(f"adapter     {inputs.adapter.path}, {inputs.adapter.relation_to(inputs.source)}")
    names = sorted({matrix.suffix for linear in linears.values() for matrix in linear.matrices})
    decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
    log(
        f"lora        rank {lora.rank}, scale {lora.scale:g}{decay}: {trained / 1e6:,.2f} M parameters "
        f"({trained / parameters:.2%}) for {', '.join(names)}"
    )


def announce(config: TrainingConfig, inputs: Inputs, blend: Blend) -> None:
    """Print the plan."""
    architecture = inputs.architecture
    parameters = architecture.parameter_count() + architecture.mtp_parameter_count()
    layout, processes = str(config.parallel), config.parallel.processes
    samples = config.steps * config.global_batch_size
    epochs = "" if len(blend.names) > 1 else f" = {samples / blend.epoch:.2f} epochs"
    width = _BYTES[config.precision]
    log(
        f"model       {architecture.family}, {parameters / 1e6:,.1f} M parameters, {architecture.num_layers} layers of "
        f"{architecture.hidden_size}, vocabulary {architecture.vocab_size}, {config.precision}"
    )
    if config.fp8:
        first, last = config.fp8.bf16_layers
        log(f"fp8         {config.fp8}")
        kept = f"first {first} and last {last} layers, " if first or last else ""
        log(f"in bf16     {kept}embedding, output layer, norms, attention{', router' * bool(architecture.moe)}")
    log(f"layout      {processes} process{'es' * (processes > 1)}{': ' + layout if layout else ''}")
    log(
        f"update      {config.global_batch_size} sequences of {config.sequence_length} = {config.tokens_per_step:,} "
        f"tokens, in {config.micro_batches} micro batch{'es' * (config.micro_batches > 1)} of {config.micro_batch_size} per rank"
    )
    log(
        f"run         {config.steps:,} updates = {config.steps * config.tokens_per_step:,} tokens{epochs}; {_rates(config)}"
    )
    if not epochs:
        for fact in blend.facts(samples):
            log(
                f"data        {fact['share']:.1%} {fact['name']}: {fact['epochs']:.2f} epochs of {fact['sequences']:,} sequences"
            )
    if config.lora is not None:
        _announce_lora(config, inputs, parameters)
    if count := architecture.mtp_depth:
        factor = config.mtp_loss_scaling_factor
        how = f"trained, loss times {factor:g}" if factor else "frozen (--mtp-loss-scaling-factor 0)"
        how = how if config.lora is None else "frozen (--lora-rank)"
        log(f"mtp         {count} layer{'s' * (count > 1)}, {how}")
    elif registry.from_files(inputs.source.hf_files).mtp:
        log("mtp         off (config.json declares MTP layers, the checkpoint has none)")
    if rates := registry.unread_rates(read_config(inputs.source.hf_files / "config.json")):
        named = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        log(f"dropout     not used: {named} of config.json, the model here has none there")
    full = parameters * (width + 12)
    saved = full if config.lora is None else adapter_parameters(config.lora, architecture) * (width + 12)
    held = states.fullest(config, architecture)
    parts = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    log(
        f"states      {quantity(held.total, 'bytes')} on each rank"
        + " of the fullest stage" * (config.parallel.pipeline > 1)
        + f": {', '.join(f'{quantity(size, "bytes")} of {name}' for name, size in parts.items())}; "
        "activations are more: --rehearse says how much"
        + (f"; {quantity(held.on_host, 'bytes')} of moments in host memory" if held.on_host else "")
    )
    log(f"disk        {quantity(saved, 'bytes')} per checkpoint, {config.keep} kept")
    if config.async_save:
        log(
            f"saves       written while training goes on, from a second copy of the state on the host: at most "
            f"{quantity(snapshot_estimate(config, architecture), 'bytes')} more per process"
        )
    if config.lora is not None:
        memory = states.fullest(replace(config, lora=None), architecture).total
        log(
            f"            trained whole: {quantity(memory, 'bytes')} of states, {quantity(full, 'bytes')} per checkpoint"
        )


def _rates(config: TrainingConfig) -> str:
    """The learning rate over the run, in words."""
    peak = f"learning rate {config.learning_rate:g} after {config.warmup_steps} updates"
    if config.schedule == "constant":
        return peak
    over = f"over the last {config.decay_steps}" if config.schedule == "wsd" else "as a cosine"
    return f"{peak}, to {config.min_learning_rate:g} {over}"
