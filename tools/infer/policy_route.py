"""`/v1/policy`: the weights of a running server are replaced by those of a directory or of a broadcast, or refused and kept.

POST {"path" or "broadcast", "version", "mode"} answers {"version", "path", "precision"}; GET answers the same. Errors have the
form of vLLM's: 403 for what the server was not started for, 409 for weights that are not taken, 424 for a broadcast that did
not arrive whole, 500 if the exchange itself failed, after which the server ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator
from starlette.background import BackgroundTask

from shared.console import log
from shared.errors import UserError
from shared.precision import DTYPES
from shared.runtime.weight_broadcast import BrokenBroadcastError
from tools.infer.drain import stop_at_once
from tools.infer.engines.weight_swap import WeightSwap
from tools.infer.received_weights import Announcement, received
from tools.infer.weight_check import OutsideFolderError, ServedWeights, WeightFile, below

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Publication(BaseModel):
    """The body of POST."""

    model_config = ConfigDict(extra="forbid")
    path: str | None = None
    broadcast: Announcement | None = None
    adapter: str | None = None
    """PEFT's directory, for a server of adapters (`adapter_policy_route.py`)."""
    version: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    mode: Literal["wait", "keep"] = "wait"
    """Requests in flight: wait for their end, or keep them and go on with the new weights."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(given is not None for given in (self.path, self.broadcast, self.adapter)) != 1:
            raise ValueError("give one of path, broadcast and adapter")
        return self


class PolicyRoute:
    """The route of one server.

    Attributes:
        failed: why the weights are undefined; None as long as they are not.
    """

    def __init__(
        self, served: ServedWeights, folder: Path | None, engine: AsyncLLM, *, broadcasts: bool = False
    ) -> None:
        """Directories below `folder` are taken, and `broadcasts` from whoever may ask."""
        self.failed: str | None = None
        self._served, self._folder, self._engine, self._broadcasts = served, folder, engine, broadcasts
        self._place = str(served.directory)
        self._lock = asyncio.Lock()
        self.router = APIRouter()
        self.router.get("/v1/policy")(self.version)
        self.router.post("/v1/policy")(self.publish)

    async def version(self) -> dict[str, str]:
        """The policy that answers."""
        version, precision = await self._engine.get_weight_version(), precision_of(self._engine)
        return {"version": version, "path": self._place, "precision": precision}

    async def publish(self, asked: Publication, request: Request) -> Any:
        """Check the weights whole, then exchange them. One publication after another."""
        async with self._lock:
            try:
                async with self._checked(asked, request) as (place, files):
                    await self._open(files)
                    return await self._answer(asked, place)
            except OutsideFolderError as error:
                return refusal(403, str(error))
            except BrokenBroadcastError as error:
                log(f"the weights stay: {error}")
                return refusal(424, str(error))
            except (UserError, OSError) as error:
                log(f"the weights stay: {error}")
                return refusal(409, str(error))

    @asynccontextmanager
    async def _checked(self, asked: Publication, request: Request) -> AsyncIterator[tuple[str, list[WeightFile]]]:
        """Where the weights come from, and the files that hold them until the block ends."""
        if asked.adapter is not None:
            raise OutsideFolderError("this server takes no adapter; start it with `infer rollouts --lora-rank`")
        if asked.broadcast is None:
            assert asked.path is not None, "checked with the body"
            if self._folder is None:
                raise OutsideFolderError("this server reads no directory; start it with --policies")
            path = below(asked.path, self._folder)
            yield str(path), await asyncio.to_thread(self._served.check, path)
            return
        if not self._broadcasts:
            raise OutsideFolderError("this server takes no broadcast; start it with `infer rollouts --broadcasts`")
        # The sender is the one who asks: a request cannot have the server connect elsewhere.
        assert request.client is not None, "a request over TCP"
        sender, address = request.client.host, request.scope["server"][0]
        arriving = received(asked.broadcast, self._served, sender=sender, address=address)
        files = await asyncio.to_thread(arriving.__enter__)
        try:
            yield f"broadcast of {sender}", files
        finally:
            arriving.__exit__(None, None, None)

    async def _answer(self, asked: Publication, place: str) -> Any:
        try:
            await self._exchange(asked)
        except Exception as error:  # noqa: BLE001 -- whatever it is, some weights are new and some old
            self.failed = f"{place}: {error or type(error).__name__}"
            answer = refusal(500, f"the weights could not be exchanged, the server ends: {self.failed}")
            answer.background = BackgroundTask(stop_at_once)
            return answer
        self._place = place
        log(f"weights of {place}, version {asked.version}")
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


def precision_of(engine: AsyncLLM) -> str:
    """The precision of an engine's arithmetic, as the flags call it."""
    dtype = str(engine.model_config.dtype).removeprefix("torch.")
    return next((name for name, known in DTYPES.items() if known == dtype), dtype)


def refusal(status: int, message: str) -> JSONResponse:
    """An error in the form of vLLM's, which is OpenAI's."""
    error = {"message": " ".join(message.split()), "type": "WeightsError", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)
