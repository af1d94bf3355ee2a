"""A small server that speaks as `infer rollouts --lora-rank` does, on PEFT; it can be told to go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.checkpoint.lora.policy_stamp import PolicyStamp
from tests.tools.rlhf.rollout.rollout_server import RolloutServer


class AdapterServer(RolloutServer):
    """The state of a server.

    Attributes:
        stamps: of the adapters that were published.
        base: what it says of its model.
    """

    lora_rank = 8

    def __init__(self, directory: Path) -> None:
        self.stamps: list[PolicyStamp] = []
        self.base = weights_digest(directory)
        self._names: set[str] = set()
        super().__init__(directory)

    def restart(self) -> None:
        super().restart()
        self.name = "policy"

    def get(self, path: str) -> tuple[int, Any]:
        status, answer = super().get(path)
        if path == "/v1/policy":
            answer |= {"model": self.name, "lora_rank": self.lora_rank, "base": self.base}
        return status, answer

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().post(path, body)
        if path == "/v1/completions" and body["model"] != self.name:  # also if `before` has changed it
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return status, answer

    def _publish(self, body: dict[str, Any]) -> tuple[int, Any]:
        path, version = Path(body["adapter"]), body["version"]
        self.published.append((str(path), version))
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            self.stamps.append(PolicyStamp.of(file.metadata()))
        found = load_file(path / "adapter_model.safetensors").keys()
        self._names = self._names or set(found)
        if lacking := sorted(self._names - found):
            return 409, {"error": {"message": f"adapter {path} lacks {lacking[0]}"}}
        if not self.lies:
            base = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
            self.model = PeftModel.from_pretrained(base, path).eval()
        self.version, self.path, self.name = version, str(path), version
        return 200, self.get("/v1/policy")[1]
