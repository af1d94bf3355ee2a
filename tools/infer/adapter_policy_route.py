"""`/v1/policy` of `infer rollouts --lora-rank`: the policy is a LoRA adapter of the server's model, each version by its name.

POST {"adapter", "version"} answers {"version", "path", "precision", "model", "lora_rank", "base"}; GET answers the same. Requests
for the policy name its version as their model. One that has been replaced is vLLM's 404 by name: no request gets another version
than it asks for. Errors are as in `policy_route.py`: 403, 409, and 500 if the engine died.
"""

from __future__ import annotations

import asyncio
import shutil
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from shared.console import log
from shared.errors import UserError
from tools.infer.policy_adapters import VERSIONS, HeldAdapter, PolicyAdapters
from tools.infer.policy_route import Publication, precision_of, refusal
from tools.infer.weight_check import OutsideFolderError, below

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class AdapterPolicyRoute:
    """The route of one server."""

    def __init__(
        self, adapters: PolicyAdapters, policies: Path, engine: AsyncLLM, *, source: Path, name: str, copies: Path
    ) -> None:
        """Adapters below `policies` are taken.

        Args:
            adapters: which of them.
            policies: the trainer's folder.
            engine: vLLM's.
            source: the server's model.
            name: of the model without adapter, in requests.
            copies: empty folder for the adapters in use.
        """
        self._adapters, self._folder, self._engine, self._copies = adapters, policies, engine, copies
        self._source, self._name = source, name
        self._held: list[HeldAdapter] = []  # the one before the policy, and the policy
        self._numbers = count()
        self._lock = asyncio.Lock()
        self.router = APIRouter()
        self.router.get("/v1/policy")(self.version)
        self.router.post("/v1/policy")(self.publish)

    async def version(self) -> dict[str, Any]:
        """The policy that answers; before the first publication the model without adapter."""
        policy = self._held[-1] if self._held else None
        return {
            "version": policy.version if policy else await self._engine.get_weight_version(),
            "path": str(policy.origin if policy else self._source),
            "precision": precision_of(self._engine),
            "model": policy.version if policy else self._name,
            "lora_rank": self._adapters.rank,
            "base": self._adapters.base,
        }

    async def publish(self, asked: Publication, request: Request) -> Any:
        """Check an adapter whole, then make it the policy. One publication after another."""
        async with self._lock:
            copy = self._copies / str(next(self._numbers))
            try:
                if asked.adapter is None:
                    raise OutsideFolderError("this server takes adapters alone; start it without --lora-rank")
                if asked.mode != "wait":
                    raise UserError("mode keep: requests in flight end with the adapter that they began with")
                path = below(asked.adapter, self._folder)
                adapter = await asyncio.to_thread(self._adapters.hold, path, asked.version, copy)
                if self._held and self._held[-1].version == asked.version:
                    return await self._again(adapter)
            except OutsideFolderError as error:
                return refusal(HTTPStatus.FORBIDDEN, str(error))
            except (UserError, OSError) as error:
                shutil.rmtree(copy, ignore_errors=True)
                log(f"the policy stays: {error}")
                return refusal(HTTPStatus.CONFLICT, str(error))
            return await self._exchange(adapter, request.app.state.openai_serving_models)

    async def _again(self, adapter: HeldAdapter) -> dict[str, Any]:
        """The version that answers was published once more: a request whose answer was lost is repeated."""
        if adapter.content != self._held[-1].content:
            raise UserError(f"adapter {adapter.origin} differs from the one that was published as {adapter.version}")
        shutil.rmtree(adapter.path)
        return await self.version()

    async def _exchange(self, adapter: HeldAdapter, models: Any) -> Any:
        """Load an adapter and unload the one before, after the requests in flight.

        A request that was named before and comes to the engine after the exchange has vLLM load the adapter again: its copy is
        kept until the next exchange.
        """
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

        engine = self._engine
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            loading = LoadLoRAAdapterRequest(lora_name=adapter.version, lora_path=str(adapter.path))
            answer = await models.load_lora_adapter(loading)
            if not isinstance(answer, str):
                shutil.rmtree(adapter.path)
                log(f"the policy stays: {answer.error.message}")
                status = HTTPStatus.INTERNAL_SERVER_ERROR if engine.errored else HTTPStatus.CONFLICT
                return refusal(status, f"vLLM does not take the adapter {adapter.origin}: {answer.error.message}")
            if self._held:
                before = self._held[-1].version
                number = models.lora_requests[before].lora_int_id
                await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=before))
                await engine.remove_lora(number)
            await engine.update_weight_version(adapter.version)
            self._held.append(adapter)
        finally:
            await engine.resume_generation()
        while len(self._held) > VERSIONS:
            shutil.rmtree(self._held.pop(0).path)
        log(f"adapter of {adapter.origin}, version {adapter.version}")
        return await self.version()
