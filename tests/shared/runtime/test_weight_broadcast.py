"""Broadcasts between threads of this process: the groups are made for one broadcast, and are no part of torch's default."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.runtime import weight_broadcast
from shared.runtime.weight_broadcast import Broadcast, BrokenBroadcastError, receive

TENSORS = [
    torch.arange(500, dtype=torch.float32),
    torch.tensor(1.0),
    torch.empty(0),
    torch.arange(21.0).bfloat16().reshape(7, 3).T,  # not contiguous
    torch.arange(3000, dtype=torch.int64).to(torch.int8),
]
BYTES = b"".join(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in TENSORS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(weight_broadcast, "BUCKET", 1000)
    monkeypatch.setattr(weight_broadcast, "TIMEOUT", 1.0)


class Receivers:
    """Receivers in threads; `write` is called with a receiver's number and its next bytes."""

    def __init__(self, count: int, write=lambda number, part: None) -> None:
        self.sending = Broadcast(count, address="127.0.0.1")
        self.got = [bytearray() for _ in range(count)]
        self.parts: list[int] = []
        self.write = write
        self.pool = ThreadPoolExecutor(count)
        self.ends = [self.pool.submit(self._receive, number) for number in range(count)]
        while not self.sending.ready():
            time.sleep(0.01)

    def _receive(self, number: int) -> None:
        def write(part: memoryview) -> None:
            self.parts.append(len(part))
            self.write(number, part)
            self.got[number].extend(part)

        place = {"port": self.sending.port, "ranks": self.sending.size, "address": "127.0.0.1"}
        receive(len(BYTES), write, host="127.0.0.1", rank=number + 1, **place)

    def errors(self) -> list[BaseException | None]:
        found = [end.exception(timeout=20) for end in self.ends]
        self.sending.close()
        self.pool.shutdown()
        return found


def test_every_receiver_has_every_byte_in_bounded_buckets():
    receivers = Receivers(3)
    receivers.sending.send(TENSORS)
    assert receivers.errors() == [None, None, None]
    assert all(bytes(got) == BYTES for got in receivers.got)
    assert max(receivers.parts) == 1000
    assert len(receivers.parts) == 3 * -(-len(BYTES) // 1000)


def test_other_bytes_than_were_sent_are_refused(monkeypatch):
    broadcast, buckets = weight_broadcast._broadcast, []

    def damaging(group, tensor):
        if group.rank() == 0 and tensor.numel() != 32:  # what is sent, not its SHA-256
            buckets.append(tensor)
            if len(buckets) == 2:
                tensor = tensor.clone()
                tensor[7] += 1
        broadcast(group, tensor)

    monkeypatch.setattr(weight_broadcast, "_broadcast", damaging)
    receivers = Receivers(1)
    receivers.sending.send(TENSORS)
    (error,) = receivers.errors()
    assert isinstance(error, BrokenBroadcastError)
    assert "SHA-256" in str(error)


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_receiver_that_is_lost_ends_it_for_all(fault):
    def lose(number, part):
        if number == 1 and len(receivers.parts) > 4:
            if fault == "dies":
                raise ConnectionError
            time.sleep(3)

    receivers = Receivers(2, lose)
    since = time.monotonic()
    with pytest.raises(BrokenBroadcastError, match="the broadcast broke off: "):
        receivers.sending.send(TENSORS)
    assert time.monotonic() - since < 10
    other, lost = receivers.errors()
    assert isinstance(other, BrokenBroadcastError)
    assert isinstance(lost, ConnectionError if fault == "dies" else BrokenBroadcastError)
    assert BYTES not in map(bytes, receivers.got)


def test_a_sender_that_gives_up_or_goes_away_tells_its_receivers():
    receivers = Receivers(2)
    receivers.sending.close()  # another server has refused
    assert all(isinstance(error, BrokenBroadcastError) for error in receivers.errors())

    def stopping():
        yield TENSORS[0]
        raise RuntimeError("killed")

    receivers = Receivers(2)
    with pytest.raises(BrokenBroadcastError, match="killed"):
        receivers.sending.send(stopping())
    receivers.sending.close()
    assert all(isinstance(error, BrokenBroadcastError) for error in receivers.errors())
    assert [bytes(got) for got in receivers.got] == [BYTES[:2000]] * 2
