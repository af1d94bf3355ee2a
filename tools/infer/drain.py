"""The end of a server that answers the requests it has: counted by an ASGI middleware, waited for by uvicorn."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shared.console import log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import uvicorn


class InFlight:
    """Requests in flight. vLLM makes the instance, from `--middleware`; the state is the process's, as the server is."""

    path = f"{__name__}.InFlight"
    requests = 0
    cut_off = 0  # by the end of the server
    server: uvicorn.Server | None = None  # from the start of the application on
    routers: tuple[Any, ...] = ()  # FastAPI's, added to vLLM's application when it starts

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            InFlight.server = scope["app"].state.server
            for router in InFlight.routers:
                scope["app"].include_router(router)
        if scope["type"] == "http":
            await self.counted(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def counted(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request; 503 if it is cut off before an answer began."""
        answered = False

        async def answer(message: dict[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        InFlight.requests += 1
        try:
            await self.app(scope, receive, answer)
        except asyncio.CancelledError:  # by uvicorn, when the time is over: no error to be logged
            InFlight.cut_off += 1
            if not answered:
                headers = [(b"content-length", b"0"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
        finally:
            InFlight.requests -= 1


async def started() -> uvicorn.Server:
    """The server, once it accepts connections."""
    while InFlight.server is None or not InFlight.server.started:
        await asyncio.sleep(0.05)
    return InFlight.server


def stop_at_once() -> None:
    """End the server without waiting for requests in flight."""
    assert InFlight.server is not None
    InFlight.server.should_exit = InFlight.server.force_exit = True


def drain(server: uvicorn.Server, seconds: int) -> None:
    """Close the port and let requests in flight finish; the second call ends them.

    `seconds`: the most, as uvicorn's `timeout_graceful_shutdown`; it is only told here.
    """
    if server.should_exit:
        server.force_exit = True
        log("stopping at once")
        return
    log(f"stopping: requests in flight: {InFlight.requests}; they have {seconds} s to finish")
    server.should_exit = True
