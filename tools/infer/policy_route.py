"""`/v1/policy`: the weights of a running server are replaced by those of a directory, or refused and kept.

POST {"path", "version", "mode"} answers {"version", "path", "precision"}; GET answers the same. Errors have the form of
vLLM's: 403 for a path that the server was not started for, 409 for a directory that is not taken, 500 if the exchange itself
failed, after which the server ends.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.background import BackgroundTask

from shared.console import log
from shared.errors import UserError
from shared.precision import DTYPES
from tools.infer.drain import stop_at_once
from tools.infer.engines.weight_swap import WeightSwap
from tools.infer.weight_check import OutsideFolderError, ServedWeights, WeightFile, below

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Publication(BaseModel):
    """The body of POST."""

    model_config = ConfigDict(extra="forbid")
    path: str
    version: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    mode: Literal["wait", "keep"] = "wait"
    """Requests in flight: wait for their end, or keep them and go on with the new weights."""


class PolicyRoute:
    """The route of one server.

    Attributes:
        failed: why the weights are undefined; None as long as they are not.
    """

    def __init__(self, served: ServedWeights, folder: Path, engine: AsyncLLM) -> None:
        self.failed: str | None = None
        self._served, self._folder, self._engine = served, folder, engine
        self._path = served.directory
        self._lock = asyncio.Lock()
        self.router = APIRouter()
        self.router.get("/v1/policy")(self.version)
        self.router.post("/v1/policy")(self.publish)

    async def version(self) -> dict[str, str]:
        """The policy that answers."""
        dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        precision = next((name for name, known in DTYPES.items() if known == dtype), dtype)
        return {"version": await self._engine.get_weight_version(), "path": str(self._path), "precision": precision}

    async def publish(self, asked: Publication) -> Any:
        """Check a directory whole, then exchange the weights. One publication after another."""
        async with self._lock:
            try:
                path = below(asked.path, self._folder)
                files = await asyncio.to_thread(self._served.check, path)
                await self._open(files)
            except OutsideFolderError as error:
                return refusal(403, str(error))
            except (UserError, OSError) as error:
                log(f"the weights stay: {error}")
                return refusal(409, str(error))
            try:
                await self._exchange(asked)
            except Exception as error:  # noqa: BLE001 -- whatever it is, some weights are new and some old
                self.failed = f"{path}: {error or type(error).__name__}"
                answer = refusal(500, f"the weights could not be exchanged, the server ends: {self.failed}")
                answer.background = BackgroundTask(stop_at_once)
                return answer
            self._path = path
            log(f"weights of {path}, version {asked.version}")
            return await self.version()

    async def _open(self, files: list[WeightFile]) -> None:
        """Have every worker open the files. UserError if one cannot."""
        given = [(file.path, file.size, file.modified) for file in files]
        answers = await self._engine.collective_rpc(WeightSwap.baton_open.__name__, args=(given,))
        for reason in filter(None, answers):
            raise UserError(reason)

    async def _exchange(self, asked: Publication) -> None:
        """Exchange the weights while nothing is computed. What is cached of the old ones is dropped."""
        engine = self._engine
        await engine.pause_generation(mode=asked.mode, clear_cache=True)
        await engine.collective_rpc(WeightSwap.baton_swap.__name__)
        if not await engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache holds keys and values of the old weights")
        await engine.update_weight_version(asked.version)
        await engine.resume_generation()


def refusal(status: int, message: str) -> JSONResponse:
    """An error in the form of vLLM's, which is OpenAI's."""
    error = {"message": " ".join(message.split()), "type": "WeightsError", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)
