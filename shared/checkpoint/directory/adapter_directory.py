"""Directories of PEFT adapters, which are no models."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.errors import UserError

CONFIG = "adapter_config.json"
_MODELS = ("model*.safetensors", "pytorch_model*.bin")


def refuse_adapter(path: Path, flag: str) -> None:
    """UserError if a directory holds an adapter and no weights of a model; the message names the base and the fix."""
    if not (path / CONFIG).is_file() or any(any(path.glob(pattern)) for pattern in _MODELS):
        return
    fields = read_config(path / CONFIG)
    base, method = fields.get("base_model_name_or_path") or "the model that it was trained on", fields.get("peft_type")
    fix = f"`convert merge-lora --source BASE --adapter {path} --target DIR`" if method == "LORA" else "peft"
    raise UserError(
        f"{flag} {path} is an adapter ({CONFIG}: {method}), not a model; merge it into its base with {fix}; BASE: {base}"
    )
