"""Weights that a trainer broadcasts to a running server (`shared/runtime/weight_broadcast.py`), held until they are exchanged.

Names, shapes and dtypes are known and checked before the first byte comes. The bytes go into a file in memory, which the workers
read as they read one of a directory: until the exchange, the server holds the weights twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shared.checkpoint.dtypes import SAFETENSORS_BITS
from shared.checkpoint.formats.safetensors_file import encode_header, header_bytes, read_header, tensor_bytes
from shared.errors import UserError
from shared.runtime.weight_broadcast import receive
from tools.infer.weight_check import ServedWeights, WeightFile, not_finite

PLACE = "the broadcast"


class Tensor(BaseModel):
    """What is announced of a tensor."""

    model_config = ConfigDict(extra="forbid")
    name: str
    dtype: str
    """safetensors' name."""
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class Announcement(BaseModel):
    """A broadcast that a trainer is about to make."""

    model_config = ConfigDict(extra="forbid")
    port: Annotated[int, Field(ge=1, le=65535)]
    """Of the group's store, on the host that the request comes from."""
    rank: Annotated[int, Field(ge=1)]
    """This server's in the group."""
    ranks: Annotated[int, Field(ge=2)]
    """The sender and all servers."""
    tensors: list[Tensor]
    """In the order in which they are sent."""


@contextmanager
def received(
    announced: Announcement, served: ServedWeights, *, sender: str, address: str
) -> Iterator[list[WeightFile]]:
    """Receive the weights; the file that holds them, until the block ends.

    Args:
        announced: by the request.
        served: the server's weights.
        sender: the host that the request comes from.
        address: this host's, by which it came.

    Raises:
        UserError: other tensors than the server's were announced, or a number is not finite.
        BrokenBroadcastError: not all has come.
    """
    described = {each.name: (each.dtype, each.shape) for each in announced.tensors}
    if len(described) < len(announced.tensors):
        raise UserError(f"{PLACE} has a tensor twice")
    if other := next((each.dtype for each in announced.tensors if each.dtype not in SAFETENSORS_BITS), None):
        raise UserError(f"{PLACE} has tensors of dtype {other}, which is not one of safetensors")
    served.check_tensors(described, PLACE)
    header = header_bytes(encode_header([(each.name, each.dtype, each.shape) for each in announced.tensors], None))
    size = sum(tensor_bytes(each.dtype, each.shape) for each in announced.tensors)
    with open(os.memfd_create("weights"), "wb") as held:
        held.write(header)
        receive(
            size,
            held.write,
            host=sender,
            port=announced.port,
            rank=announced.rank,
            ranks=announced.ranks,
            address=address,
        )
        held.flush()
        path = Path(f"/proc/{os.getpid()}/fd/{held.fileno()}")
        if found := not_finite({tensor.name: tensor for tensor in read_header(path).tensors}):
            raise UserError(f"{PLACE}: {found} has numbers that are NaN or infinite")
        yield [WeightFile.of(path)]
