"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` with vLLM's bodies, for adapters below one folder that fit the model.

vLLM's own routes read any path, and are off without an environment variable that this server does not need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from shared.console import log
from shared.errors import UserError
from tools.infer.policy_route import refusal
from tools.infer.served_adapters import Adapter
from tools.infer.weight_check import OutsideFolderError, below

Name = Field(min_length=1, max_length=200)


class Loading(BaseModel):
    """The body of /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str = Name
    lora_path: str


class Unloading(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str = Name


class AdapterRoute:
    """The routes of one server.

    `check`: name and path to an adapter; UserError if it does not fit.
    """

    def __init__(self, folder: Path, check: Callable[[str, Path], Adapter]) -> None:
        self._folder, self._check = folder, check
        self.router = APIRouter()
        self.router.post("/v1/load_lora_adapter")(self.load)
        self.router.post("/v1/unload_lora_adapter")(self.unload)

    async def load(self, asked: Loading, request: Request) -> Any:
        """Check an adapter and load it under a new name."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        try:
            path = below(asked.lora_path, self._folder)
            await asyncio.to_thread(self._check, asked.lora_name, path)
        except OutsideFolderError as error:
            return refusal(403, str(error))
        except (UserError, OSError) as error:
            return refusal(409, str(error))
        models = request.app.state.openai_serving_models
        loading = LoadLoRAAdapterRequest(lora_name=asked.lora_name, lora_path=str(path))
        return _answer(await models.load_lora_adapter(loading), f"adapter {asked.lora_name} of {path}")

    async def unload(self, asked: Unloading, request: Request) -> Any:
        """Forget an adapter; requests in flight finish with it."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        models = request.app.state.openai_serving_models
        unloading = UnloadLoRAAdapterRequest(lora_name=asked.lora_name)
        return _answer(await models.unload_lora_adapter(unloading), f"adapter {asked.lora_name} is unloaded")


def _answer(result: Any, done: str) -> Any:
    """vLLM's result: a text, or an error."""
    if isinstance(result, str):
        log(done)
        return {"message": result}
    return refusal(int(result.error.code), result.error.message)
