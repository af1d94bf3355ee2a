"""`--lora-rank`: LoRA adapters (arXiv:2106.09685) of a transformers model, by PEFT.

The weights of the source are frozen and held once: the reference policy is the same model with its adapters off. What is trained
is A and B of every adapter, and the head of a reward model or critic.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.directory.adapter_directory import CONFIG, WEIGHTS
from shared.checkpoint.directory.peft_config import AdapterConfig
from shared.checkpoint.dtypes import weight_dtype
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.lora.match import match, read_adapter
from shared.checkpoint.lora.merge_adapter import merged_tensor
from shared.checkpoint.lora.peft_files import TOKENIZER_FILES, adapter_config
from shared.checkpoint.lora.policy_stamp import PolicyStamp
from shared.console import log
from shared.errors import StageError, UserError
from shared.families import registry
from shared.mapping.adapters import LoraSettings, adapted_linears, peft_shapes
from shared.mapping.rule import Table
from shared.precision import DTYPES, TrainingPrecision
from shared.training.lora_options import settings_of_flags
from tools.rlhf.models import Critic, Source
from tools.rlhf.options import Options
from tools.rlhf.published_directory import stored_tensors

_HEAD = "score"  # the module of transformers' sequence classifiers
HEAD_WEIGHT = f"base_model.model.{_HEAD}.weight"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters to train, of a source."""

    settings: LoraSettings
    source: Source
    table: Table
    classifier: bool
    """The trained class is a sequence classifier, whose head is trained as a whole."""

    @classmethod
    def open(cls, options: Options, source: Source, *, classifier: bool = False) -> Adapters | None:
        """The adapters that the flags ask for; None without `--lora-rank`.

        Raises:
            UserError: the family is none of `convert families`, or a target is no linear layer of it.
        """
        if options.lora_rank is None:
            return None
        settings = settings_of_flags(
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets,
            dropout=options.adapter_dropout,
            rslora=options.rslora,
        )
        reader = HfReader(source.path)
        try:
            architecture = registry.drop_missing_mtp(registry.from_files(source.path), reader.weights)
        except UserError as error:
            raise UserError(f"--lora-rank: {error}") from None
        table = registry.table_of(architecture)
        adapted_linears(table, settings.targets)  # refuses unknown targets
        return cls(settings=settings, source=source, table=table, classifier=classifier)

    @property
    def stacked(self) -> list[str]:
        """`target_parameters` of adapter_config.json: experts that transformers holds as one tensor."""
        found: list[str] = self._fields("").get("target_parameters", [])
        return found

    def config(self) -> Any:
        """PEFT's configuration."""
        from peft import LoraConfig

        fields = self._fields("")
        # PEFT finds fan_in_fan_out by the module's class, and warns of another value.
        for name in ("peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "fan_in_fan_out"):
            fields.pop(name)
        return LoraConfig(**fields)

    def attach(self, model: Any, seed: int, *, main_weights: bool = False) -> Any:
        """A PEFT model around a transformers model.

        Args:
            model: the transformers model.
            seed: of the adapters.
            main_weights: adapters are float32, as an optimizer that holds no other weights needs them; else in the model's dtype.
        """
        from peft import get_peft_model

        torch.manual_seed(seed)
        made = get_peft_model(model, self.config(), autocast_adapter_dtype=False)
        for parameter in made.parameters():
            if main_weights and parameter.requires_grad:
                parameter.data = parameter.data.float()
        return made

    def attach_to_critic(self, critic: Critic, seed: int) -> Critic:
        """Freeze a critic's body and give it adapters; its head is trained as a whole.

        Raises:
            UserError: the body has none of the linear layers of the policy's adapters.
        """
        from peft import inject_adapter_in_model

        torch.manual_seed(seed)
        config = self.config()
        config.modules_to_save = None
        critic.body.requires_grad_(False)
        try:
            inject_adapter_in_model(config, critic.body)
        except ValueError as error:
            line = str(error).splitlines()[0]
            raise UserError(
                f"--lora-rank: the critic's body takes no adapters of the policy's linear layers ({line}); give a --critic of "
                "the policy's family"
            ) from None
        for name, parameter in critic.body.named_parameters():
            parameter.requires_grad_(".lora_" in name)
            if ".lora_" in name:
                parameter.data = parameter.data.to(critic.head.weight.dtype)
        return critic

    def tensors(self, model: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of adapter_model.safetensors, by PEFT's names.

        Args:
            model: the PEFT model.
            trained: its unsharded trained weights, by names of its state dict.

        Raises:
            StageError: a number is not finite.
            UserError: the class of transformers has other linear layers than the family's table.
        """
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
        wanted = peft_shapes(adapted_linears(self.table, self.settings.targets), self.settings.rank)
        made = {name: tensor.shape for name, tensor in found.items() if name != HEAD_WEIGHT}
        if differing := sorted(set(made.items()) ^ {(name, torch.Size(shape)) for name, shape in wanted.items()}):
            name, shape = differing[0]
            raise UserError(
                f"--lora-rank: {name} {list(shape)} is in one of {self.source.kind.__name__} with PEFT and the family's table "
                "and not in the other; give --lora-targets that both have"
            )
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise StageError(f"{name} is not finite after training; nothing is published. Lower --learning-rate")
        return {name: tensor.contiguous() for name, tensor in sorted(found.items())}

    def write(
        self,
        directory: Path,
        tensors: Mapping[str, Tensor],
        *,
        target: Path,
        tokenizer_files: bool = True,
        stamp: PolicyStamp | None = None,
    ) -> str:
        """Write PEFT's files and the source's tokenizer; returns the base's path from the target.

        Args:
            directory: where to write.
            tensors: of `tensors`.
            target: the directory when published.
            tokenizer_files: whether the tokenizer's files are copied.
            stamp: noted in the metadata of the tensors.
        """
        relative = os.path.relpath(self.source.path.resolve(), target.resolve())
        (directory / CONFIG).write_text(json.dumps(self._fields(relative), indent=2) + "\n", encoding="utf-8")
        metadata = {"format": "pt"} | (stamp.metadata() if stamp else {})
        (directory / WEIGHTS).write_bytes(save(dict(tensors), metadata=metadata))
        for name in TOKENIZER_FILES if tokenizer_files else ():
            if (self.source.path / name).is_file() and not (directory / name).exists():
                shutil.copyfile(self.source.path / name, directory / name)
        return relative

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The source's tensors that the adapters change, `W + scale * B @ A` rounded once to the dtype of W, by their names.

        Every bit is that of `convert merge-lora`, whose arithmetic it is.

        Args:
            tensors: of `tensors`.
        """
        reader = HfReader(self.source.path)
        linear = {name: tensor for name, tensor in tensors.items() if name != HEAD_WEIGHT}
        made: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder, OpenFiles() as files:
            self.write(Path(folder), linear, target=Path(folder), tokenizer_files=False)
            config, stored = AdapterConfig(Path(folder)), read_adapter(Path(folder))
            if self.classifier:
                config.modules_to_save = ()
            table = self.table.with_names_of(reader.tensors)
            for name, deltas in match(config, stored, table, self.table.prefix_variants).deltas.items():
                whole = reader.tensors[name]
                dtype, data = weight_dtype(whole.dtype, name, whole.place), bytearray()
                for operation in merged_tensor(whole, dtype, deltas):
                    out = memoryview(bytearray(operation.size))
                    operation.fill(files, out)
                    data += out
                made[name] = torch.frombuffer(data, dtype=getattr(torch, dtype.name)).reshape(whole.shape)
        return made

    def policy_weights(self, model: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the source, with the adapters merged; on rank 0.

        Args:
            model: the PEFT model.
            trained: its unsharded trained weights.
        """
        reader, merged = HfReader(self.source.path), self.merged(self.tensors(model, trained))
        return merged | stored_tensors(reader, sorted(reader.tensors.keys() - merged.keys()))

    def _fields(self, base: str) -> dict[str, Any]:
        fields = adapter_config(self.settings, self.table, base, task="SEQ_CLS" if self.classifier else "CAUSAL_LM")
        return fields | ({"modules_to_save": [_HEAD]} if self.classifier else {})


class AdapterOff(nn.Module):
    """The reference policy: the trained model with its adapters off."""

    def __init__(self, engine: Any) -> None:
        """`engine`: of a PEFT model."""
        super().__init__()
        self._engine = [engine]  # no submodule: its weights are the engine's

    @property
    def module(self) -> Any:
        """The PEFT model."""
        return self._engine[0].module

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass without adapters."""
        with self.module.disable_adapter():
            return self._engine[0](**inputs)


def held_dtype(precision: TrainingPrecision, adapters: Adapters | None) -> torch.dtype:
    """Dtype in which TRL's trainers are given the policy.

    What is trained is float32: the main weights. The frozen weights of a training with LoRA are in the precision.
    """
    return torch.float32 if adapters is None else getattr(torch, DTYPES[precision])


def log_adapters(adapters: Adapters, model: nn.Module) -> None:
    """The line of the plan that says what is trained."""
    settings, counts = adapters.settings, [0, 0]
    for parameter in model.parameters():
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    log(
        f"LoRA      rank {settings.rank}, scale {settings.scale:g}, of {', '.join(settings.targets)}: {counts[1]:,} parameters "
        f"trained, {counts[0]:,} frozen"
    )
