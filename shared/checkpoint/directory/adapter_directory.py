"""Directories of LoRA adapters, which are no models: PEFT's, and run directories of a training with LoRA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.manifest import ADAPTER, MANIFEST, Manifest, input_fingerprint, read_manifest
from shared.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACT = ADAPTER
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


def refuse_adapter_run(path: Path, manifest: Manifest, flag: str) -> None:
    """UserError if a run directory holds LoRA adapters only; the message says where the base is, and the fix."""
    if manifest.kind != "megatron" or FACT not in manifest.facts:
        return
    base = manifest.facts[FACT]["base"]
    raise UserError(
        f"{flag} {path} holds LoRA adapters only, without their base ({base_state(path, base)}); publish them with "
        f"`convert to-hf --source {path} --base HF_DIR` and merge them with `convert merge-lora`"
    )


def base_of(path: Path, manifest: Manifest | None, run: Path) -> dict[str, Any]:
    """The base of a run's adapters: its path from the run directory, its content, and the fingerprints of its own inputs."""
    return {
        "path": os.path.relpath(path.resolve(), run.resolve()),
        "fingerprint": input_fingerprint(path),
        "iteration": manifest.iteration if manifest else None,
        "parents": [parent.fingerprint for parent in manifest.parents] if manifest else [],
    }


def base_state(run: Path, base: dict[str, Any]) -> str:
    """Path of a run's base and whether it is there, in words."""
    path = Path(os.path.normpath(run.resolve() / base["path"]))
    if not path.is_dir():
        return f"{path}, which is missing"
    return str(path) if input_fingerprint(path) == base["fingerprint"] else f"{path}, which has another content now"


def is_base(directory: Path, base: dict[str, Any]) -> bool:
    """Whether a Hugging Face directory has the weights of a base: the base was converted from it, or it from the base."""
    fingerprint = input_fingerprint(directory)
    manifest = read_manifest(directory, flag="--base") if (directory / MANIFEST).is_file() else None
    made_from = [parent.fingerprint for parent in manifest.parents if parent.flag == "source"] if manifest else []
    return fingerprint in base["parents"] or base["fingerprint"] in made_from
