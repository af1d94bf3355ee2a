"""Tensors from one process to several others, by a broadcast of torch.distributed: a trainer's weights to its servers.

A group of gloo is made for one broadcast. Rank 0 sends and holds the group's store; ranks 1 and above receive. Both sides hold
the weights in host memory, also with GPUs, whose memory a server gives to its cache: so the group is gloo's everywhere.

What is sent is the tensors' bytes one after another, in buckets of `BUCKET` bytes, then their SHA-256. A rank that dies or hangs
ends the broadcast of all others within `TIMEOUT` seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from shared.errors import StageError

BUCKET = 64 << 20  # bytes
TIMEOUT = 30.0  # seconds, for the others to come, and for each bucket


class BrokenBroadcastError(StageError):
    """It did not arrive whole."""


class Broadcast:
    """The sending side.

    Attributes:
        port: where receivers find the store, on this host.
        size: ranks, the sender included.
    """

    def __init__(self, receivers: int, *, address: str) -> None:
        """`address`: this host's, by which the receivers reach it."""
        self.size = receivers + 1
        self._address = address
        self._store: TCPStore | None = TCPStore(
            "localhost", 0, self.size, is_master=True, timeout=timedelta(seconds=TIMEOUT), wait_for_workers=False
        )
        self.port: int = self._store.port
        self._group: ProcessGroupGloo | None = None

    def ready(self) -> bool:
        """Whether every receiver waits for the weights."""
        assert self._store is not None, "closed"
        return bool(self._store.check([_ready(rank) for rank in range(1, self.size)]))

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Send tensors of the CPU, once all are ready. BrokenBroadcastError if a receiver goes away."""
        assert self._store is not None, "closed"
        digest = hashlib.sha256()
        try:
            self._group = _group(self._store, 0, self.size, self._address)
            bucket, filled = torch.empty(BUCKET, dtype=torch.uint8), 0
            for tensor in tensors:
                left = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                while left.numel():
                    piece, left = left[: BUCKET - filled], left[BUCKET - filled :]
                    bucket[filled : filled + piece.numel()] = piece
                    filled += piece.numel()
                    if filled == BUCKET:
                        digest.update(bucket.numpy())
                        _broadcast(self._group, bucket)
                        filled = 0
            if filled:
                digest.update(bucket[:filled].numpy())
                _broadcast(self._group, bucket[:filled])
            _broadcast(self._group, torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
        except RuntimeError as error:
            raise BrokenBroadcastError(f"the broadcast broke off: {_reason(error)}") from None

    def close(self) -> None:
        """End it; receivers that still wait are told at once. Before that, they must have answered."""
        self._group = self._store = None


def receive(
    size: int, write: Callable[[memoryview], object], *, host: str, port: int, rank: int, ranks: int, address: str
) -> None:
    """Receive `size` bytes as rank `rank` of `ranks`, from the sender at `host` and `port`.

    Args:
        size: of all tensors.
        write: called with the next bytes.
        host: the sender's.
        port: of its store.
        rank: of this receiver, from 1.
        ranks: of the group.
        address: this host's, by which the other ranks reach it.

    Raises:
        BrokenBroadcastError: the bytes did not all come, or are others than were sent.
    """
    digest = hashlib.sha256()
    try:
        store = TCPStore(host, port, ranks, is_master=False, timeout=timedelta(seconds=TIMEOUT))
        store.set(_ready(rank), "")
        group = _group(store, rank, ranks, address)
        bucket = torch.empty(min(BUCKET, size), dtype=torch.uint8)
        for start in range(0, size, BUCKET):
            part = bucket[: size - start]
            _broadcast(group, part)
            received = memoryview(part.numpy())
            digest.update(received)
            write(received)
        said = torch.empty(digest.digest_size, dtype=torch.uint8)
        _broadcast(group, said)
    except RuntimeError as error:
        raise BrokenBroadcastError(f"the broadcast broke off: {_reason(error)}") from None
    if bytes(said.tolist()) != digest.digest():
        raise BrokenBroadcastError("the bytes received are not those that were sent (SHA-256)")


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _group(store: TCPStore, rank: int, size: int, address: str) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=TIMEOUT)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, size, options)


def _broadcast(group: ProcessGroupGloo, tensor: Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the place in torch's sources and its advice around it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("["):
        text = text.partition("] ")[2] or text
    return text.partition(". ")[0]
