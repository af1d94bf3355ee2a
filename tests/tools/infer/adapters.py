"""LoRA adapters of tiny models as a trainer publishes them, made and merged in plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.checkpoint.lora.policy_stamp import PolicyStamp

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(
    path: Path, base: Path, *, version: str, seed: int = 0, rank: int = 4, targets: Sequence[str] = TARGETS
) -> Path:
    """PEFT's directory of an adapter with random A and B, scale 2, and the stamp of a version."""
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = 0.2 * torch.randn(shape, generator=noise)
    path.mkdir()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none"}
    fields |= {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    (path / CONFIG).write_text(json.dumps(fields))
    stamp = PolicyStamp(version=version, base=weights_digest(base))
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"} | stamp.metadata())
    return path


def restamped(
    adapter: Path,
    name: str,
    *,
    version: str | None = None,
    base: str | None = None,
    drop: Sequence[str] = (),
    nan: str | None = None,
) -> Path:
    """A copy beside an adapter with another stamp, without some tensors, or with a NaN in one."""
    copy = shutil.copytree(adapter, adapter.with_name(f"{adapter.name}-{name}"))
    with safe_open(adapter / WEIGHTS, "pt") as file:
        stamp = PolicyStamp.of(file.metadata())
    tensors = {key: tensor for key, tensor in load_file(adapter / WEIGHTS).items() if key not in drop}
    if nan:
        tensors[nan].view(-1)[-1] = float("nan")
    stamp = PolicyStamp(version=version or stamp.version, base=base or stamp.base)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"} | stamp.metadata())
    return copy


def merged_into(model: Path, adapter: Path) -> Path:
    """Add `2 B A` to the weights of a model, in float64, rounded once."""
    weights, tensors = load_file(model / "model.safetensors"), load_file(adapter / WEIGHTS)
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            plain = name.removeprefix("base_model.model.").replace("lora_B.", "")
            product = 2.0 * (b.double() @ tensors[name.replace("lora_B", "lora_A")].double())
            weights[plain] = (weights[plain].double() + product).to(weights[plain].dtype)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model
