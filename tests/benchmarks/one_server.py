"""`infer serve` as one server for both ways: requests pass the code of infer, or go to vLLM's application past it, as told.

    python tests/benchmarks/one_server.py serve --source DIR ...

`PUT /way/infer` and `PUT /way/vllm` switch: the answer is 204. What is around the requests (process, engine, socket) stays the
same.
"""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("infer", "vllm")
PATHS = {f"/way/{way}": way for way in WAYS}


def install() -> None:
    """Make infer's middleware (`tools/infer/drain.py`) one that can be passed by."""
    from tools.infer.drain import InFlight

    through, way = InFlight.__call__, WAYS[0]

    async def either(self: InFlight, scope: dict[str, Any], receive: Any, send: Any) -> None:
        nonlocal way
        if scope["type"] == "http" and scope["path"] in PATHS:
            way = PATHS[scope["path"]]
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif scope["type"] == "http" and way == "vllm":
            await self.app(scope, receive, send)
        else:
            await through(self, scope, receive, send)

    InFlight.__call__ = either  # type: ignore[method-assign]


def switch(base: str, way: str) -> None:
    """Send the next requests of the server at `base` this way."""
    with urllib.request.urlopen(urllib.request.Request(f"{base}/way/{way}", method="PUT"), timeout=60):
        pass


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tools.infer.cli import main

    install()
    main()
