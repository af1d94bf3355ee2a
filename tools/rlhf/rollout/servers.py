"""Servers of `infer rollouts`, asked over HTTP: replies to token ids, and the policy that answers.

What is relied on: `POST /v1/completions` with token ids, `return_token_ids`, `logprobs: 0` and a seed for each reply; `POST` and
`GET /v1/policy`; `GET /v1/models`; `GET /health`. A server that is away for `PATIENCE` seconds ends the run with its address.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import torch
from safetensors.torch import save
from torch import Tensor

from shared.errors import StageError, UserError
from shared.runtime.weight_broadcast import Broadcast, BrokenBroadcastError

PATIENCE = (
    30.0  # seconds that a server may be away: long enough for a restart of the server's process, not of its machine
)
PAUSE = 1.0  # seconds between two attempts
PROBE_EVERY = 5.0  # seconds between two questions whether a server that computes is there
PROBE_TIMEOUT = 10.0  # seconds for the answer
READY_EVERY = 0.02  # seconds between two questions whether all servers wait for a broadcast
CONNECTIONS = 256  # of a process to a server: vLLM computes as many replies at once by default

_SERVER_FAULT = 500  # and above: the server may be better in a moment


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server says of itself."""

    model: str
    """The model's name in requests."""
    max_model_len: int
    """Tokens of a prompt and its reply."""
    precision: str
    """Of its arithmetic."""
    lora_rank: int = 0
    """The largest of adapters that it takes; 0 if it takes whole policies."""
    base: str = ""
    """`weights_digest` of the model that adapters are added to."""


class GonePolicyError(StageError):
    """A server does not know the policy that a request names."""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """The servers of `--rollouts`."""

    addresses: tuple[str, ...]
    """As given, with or without `/v1`."""
    timeout: float
    """Seconds for the replies to all requests of `complete`, and for each publication."""
    key: str | None = None

    def describe(self) -> list[Served]:
        """What each server says of itself.

        Raises:
            UserError: a server is not there, is another one, or wants a key.
        """
        try:
            asked = [_describe(self._client(address), address) for address in self.addresses]
            return self._together(asked, watched=self.addresses)
        except StageError as error:
            raise UserError(str(error)) from None

    def versions(self) -> list[str]:
        """The version of the policy that each server answers with."""
        asked = [_version(self._client(address), address) for address in self.addresses]
        return self._together(asked, watched=self.addresses)

    def publish(self, path: Path, version: str, *, to: Sequence[str]) -> None:
        """Have the servers of `to` take the policy of `path`. StageError with a server's reason if it does not."""
        body = {"path": str(path), "version": version}
        self._together([_publish(self._client(address), address, body) for address in to], watched=to)

    def publish_adapter(self, path: Path, version: str, *, to: Sequence[str]) -> None:
        """As `publish`, of a LoRA adapter."""
        body = {"adapter": str(path), "version": version}
        self._together([_publish(self._client(address), address, body) for address in to], watched=to)

    def broadcast(self, weights: Mapping[str, Tensor], version: str, *, to: Sequence[str]) -> None:
        """Broadcast the policy to the servers of `to`. StageError with a server's reason if it does not take it."""
        self._together([self._broadcast(weights, version, to)], watched=to)

    async def _broadcast(self, weights: Mapping[str, Tensor], version: str, to: Sequence[str]) -> None:
        tensors = [{"name": n, "dtype": _stored(t.dtype), "shape": list(t.shape)} for n, t in weights.items()]
        sending = Broadcast(len(to), address=_address_towards(to))
        said = {"port": sending.port, "ranks": sending.size, "tensors": tensors}
        bodies = [{"version": version, "broadcast": said | {"rank": rank}} for rank, _ in enumerate(to, 1)]
        asked = [
            asyncio.ensure_future(_offer(self._client(address), address, body))
            for address, body in zip(to, bodies, strict=True)
        ]
        broken: list[BaseException] = []
        sent = False
        try:
            while not sending.ready() and not any(one.done() for one in asked):  # one that is done has refused
                await asyncio.sleep(READY_EVERY)
            if sending.ready():
                await asyncio.to_thread(sending.send, weights.values())
                sent = True
        except BrokenBroadcastError as error:
            broken.append(error)
        if not sent:
            sending.close()  # the others wait for nothing
        answers = await asyncio.gather(*asked, return_exceptions=True)
        sending.close()
        faults = [answer for answer in answers if isinstance(answer, BaseException)] + broken
        faults.sort(key=lambda fault: isinstance(fault, BrokenBroadcastError))  # the consequences last
        if faults:
            raise faults[0]

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The choice of each request's answer; requests are dealt to the servers in turn. An aborted one is asked for again.

        Raises:
            GonePolicyError: a server has no model of a request's name, or no longer.
        """
        addresses = self.addresses

        async def dealt() -> list[dict[str, Any]]:
            clients = [self._client(address) for address in addresses]
            try:
                return await asyncio.gather(
                    *(
                        _complete(clients[i % len(clients)], addresses[i % len(addresses)], request)
                        for i, request in enumerate(requests)
                    )
                )
            finally:
                await asyncio.gather(*(client.aclose() for client in clients))

        return self._together([dealt()], watched=addresses[: len(requests)])[0]

    def _client(self, address: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=base_of(address),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(self.timeout, connect=PROBE_TIMEOUT, pool=None),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            verify=_trust(),
            trust_env=False,  # a proxy of the environment is for other hosts than these
        )

    def _together[T](self, calls: Sequence[Awaitable[T]], *, watched: Sequence[str] = ()) -> list[T]:
        """Await the calls, and that the watched servers are there meanwhile."""
        return asyncio.run(self._watching(calls, watched))

    async def _watching[T](self, calls: Sequence[Awaitable[T]], watched: Sequence[str]) -> list[T]:
        """By the seconds above, a server that hangs is named 48 s after the first call that it does not answer."""
        work: asyncio.Future[list[T]] = asyncio.ensure_future(asyncio.gather(*calls))
        watches = [asyncio.ensure_future(self._watch(address)) for address in watched]
        tasks: list[asyncio.Future[Any]] = [work, *watches]
        done, _ = await asyncio.wait(tasks, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if work in done:
            return work.result()
        for watch in done:
            watch.result()  # raises
        raise StageError(
            f"--rollouts {', '.join(watched or self.addresses)} took longer than --rollout-timeout {self.timeout:g} s; "
            "the last saved state is kept"
        )

    async def _watch(self, address: str) -> None:
        """StageError when the server does not say for `PATIENCE` seconds that it is well; its connections may stay open."""
        health = f"{base_of(address).removesuffix('/v1')}/health"
        async with self._client(address) as client:
            while True:
                await asyncio.sleep(PROBE_EVERY)
                await _ask(client, address, lambda: client.get(health, timeout=PROBE_TIMEOUT))


@cache
def _trust() -> ssl.SSLContext:
    """The system's certificates; reading them takes longer than a request."""
    return ssl.create_default_context()


def base_of(address: str) -> str:
    """`http://HOST:PORT/v1` of an address with or without `/v1`."""
    return f"{address.rstrip('/').removesuffix('/v1').rstrip('/')}/v1"


def read_key(path: Path) -> str:
    """The first line of a key file that has one. UserError without."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if key := line.strip():
            if not key.isascii() or not key.isprintable():
                raise UserError(f"--rollout-key-file {path}: a key is printable ASCII")
            return key
    raise UserError(f"--rollout-key-file {path} holds no key")


async def _describe(client: httpx2.AsyncClient, address: str) -> Served:
    async with client:
        policy = await _json(client, address, "GET", "policy")
        models = await _json(client, address, "GET", "models")
        first = models["data"][0]
        return Served(
            model=str(first["id"]),
            max_model_len=int(first["max_model_len"]),
            precision=str(policy["precision"]),
            lora_rank=int(policy.get("lora_rank", 0)),
            base=str(policy.get("base", "")),
        )


async def _version(client: httpx2.AsyncClient, address: str) -> str:
    async with client:
        return str((await _json(client, address, "GET", "policy"))["version"])


async def _publish(client: httpx2.AsyncClient, address: str, body: Mapping[str, Any]) -> None:
    async with client:
        await _json(client, address, "POST", "policy", body)


async def _offer(client: httpx2.AsyncClient, address: str, body: Mapping[str, Any]) -> None:
    """Have a server receive a broadcast. It is asked once: the broadcast is made once."""
    async with client:
        try:
            answer = await client.post("policy", json=body)
        except httpx2.TransportError as error:
            raise StageError(
                f"--rollouts {address} went away while it was given the policy ({error or type(error).__name__}); the last saved "
                "state is kept: start the server again, then run the same command"
            ) from None
        if answer.status_code == httpx2.codes.FAILED_DEPENDENCY:
            raise BrokenBroadcastError(f"--rollouts {address}: {_reason(answer)}; the last saved state is kept")
        _read(answer, address, "policy")


@cache
def _stored(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype."""
    raw = save({"x": torch.empty(0, dtype=dtype)})
    return str(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["x"]["dtype"])


def _address_towards(addresses: Sequence[str]) -> str:
    """This host's address by which servers reach it; with servers on this host and elsewhere, the one for elsewhere."""
    found = []
    for address in addresses:
        parts = urlsplit(base_of(address))
        try:
            family, kind, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # sends nothing
                found.append(str(probe.getsockname()[0]))
        except OSError as error:
            raise StageError(f"--rollouts {address}: {error.strerror or error}") from None
    return next((one for one in found if not one.startswith("127.") and one != "::1"), found[0])


async def _complete(client: httpx2.AsyncClient, address: str, request: Mapping[str, Any]) -> dict[str, Any]:
    until = None
    while True:
        answer = await _json(client, address, "POST", "completions", request)
        if answer["model"] != request["model"]:
            raise StageError(
                f"--rollouts {address} answers for {answer['model']}, and was asked for {request['model']}"
            )
        choice: dict[str, Any] = answer["choices"][0]
        if choice["finish_reason"] != "abort":
            return choice
        until = until or time.monotonic() + PATIENCE
        if time.monotonic() > until:
            raise StageError(f"--rollouts {address} breaks off every reply; see its log")
        await asyncio.sleep(PAUSE)


async def _json(
    client: httpx2.AsyncClient, address: str, method: str, route: str, body: Mapping[str, Any] | None = None
) -> Any:
    answer = await _ask(client, address, lambda: client.request(method, route, json=body))
    return _read(answer, address, route)


def _read(answer: httpx2.Response, address: str, route: str) -> Any:
    """The answer's JSON; StageError for what is not one."""
    if answer.status_code == httpx2.codes.UNAUTHORIZED:
        raise StageError(f"--rollouts {address} needs a key: give --rollout-key-file")
    if answer.status_code in (httpx2.codes.NOT_FOUND, httpx2.codes.METHOD_NOT_ALLOWED) and route == "policy":
        raise StageError(f"--rollouts {address} takes no policy; start the server with `infer rollouts`")
    if answer.status_code == httpx2.codes.NOT_FOUND and route == "completions":
        raise GonePolicyError(f"--rollouts {address}: {_reason(answer)}")
    if answer.status_code != httpx2.codes.OK:
        raise StageError(f"--rollouts {address}: {_reason(answer)}; the last saved state is kept")
    try:
        return answer.json()
    except ValueError:
        raise StageError(f"--rollouts {address} does not answer as `infer rollouts` does") from None


async def _ask(
    client: httpx2.AsyncClient, address: str, request: Callable[[], Awaitable[httpx2.Response]]
) -> httpx2.Response:
    """The answer of a server that may be away for a while."""
    since = None
    while True:
        try:
            answer = await request()
            if answer.status_code < _SERVER_FAULT:
                return answer
            reason = _reason(answer)
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
        since = since or time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise StageError(
                f"--rollouts {address} has not answered for {PATIENCE:.0f} s ({reason}); the last saved state is kept: "
                "start the server again, then run the same command"
            )
        await asyncio.sleep(PAUSE)


def _reason(answer: httpx2.Response) -> str:
    try:
        return " ".join(str(answer.json()["error"]["message"]).split())
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return f"status {answer.status_code}"
