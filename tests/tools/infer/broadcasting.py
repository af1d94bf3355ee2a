"""A trainer that broadcasts its policy to one server, and can go wrong on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import save

from shared.runtime.weight_broadcast import Broadcast, BrokenBroadcastError


def announced(weights: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Names, dtypes and shapes as in a file of the safetensors library."""
    raw = save({name: tensor.contiguous() for name, tensor in weights.items()})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [{"name": name, "dtype": header[name]["dtype"], "shape": header[name]["shape"]} for name in weights]


def broadcast(
    weights: Mapping[str, torch.Tensor], post: Callable[[dict[str, Any]], Any], *, killed_after: int | None = None
) -> Any:
    """The server's answer; `killed_after`: the trainer dies when so many tensors have been sent."""

    def tensors():
        for number, tensor in enumerate(weights.values()):
            if number == killed_after:
                raise RuntimeError("killed")
            yield tensor

    sending = Broadcast(1, address="127.0.0.1")
    said = {"port": sending.port, "rank": 1, "ranks": 2, "tensors": announced(weights)}
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(post, {"version": "sent", "broadcast": said})
        while not answer.done() and not sending.ready():
            time.sleep(0.01)
        if not answer.done():
            try:
                sending.send(tensors())
            except BrokenBroadcastError:
                assert killed_after is not None
                sending.close()
        result = answer.result()
    sending.close()
    return result
