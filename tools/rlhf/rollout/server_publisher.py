"""What publishers to servers of `infer rollouts` share: weights in the source's names and dtypes, and who has which version."""

from __future__ import annotations

import hashlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shared.runtime.agreement import on_rank_0
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.published_directory import source_weights
from tools.rlhf.rollout.publisher import Policy
from tools.rlhf.rollout.servers import Servers


def run_name(target: Path) -> str:
    """A name of the runs of a target. The target's lock makes one process the only one with it."""
    return f"{target.name}-{hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:8]}"


class ServerPublisher(ABC):
    """The `Publisher` of `ServerSampler`. Rank 0 speaks with the servers.

    Attributes:
        servers: that get the policy.
        version: that was published last.
    """

    def __init__(self, name: str, source: Source, servers: Servers, adapters: Adapters | None = None) -> None:
        """`name` is the run's, in versions. Adapters are published merged."""
        self._adapters, self._name, self._source, self.servers = adapters, name, source, servers
        self._run = secrets.token_hex(4)  # a policy of an earlier process of this run is not taken for this one's
        self.version = ""

    def publish(self, policy: Policy, version: int) -> None:
        """See `Publisher`. StageError if a server does not take the weights."""
        weights = policy.full_weights()
        on_rank_0(lambda: self._publish(policy, weights, version))

    def assure(self) -> None:
        """Have every server answer with the version that was published last; rank 0 only."""
        if behind := [address for address, found in self._found() if found != self.version]:
            self._give(behind)

    def requested(self, served: str) -> str:
        """The policy's name in requests to servers that call their model `served`; rank 0 only."""
        return served

    def wrong(self) -> str:
        """The first server that does not answer with the version that was published last, in words; rank 0 only."""
        for address, found in self._found():
            if found != self.version:
                return f"--rollouts {address} answers with policy {found!r}, where {self.version!r} was published"
        return ""

    def _found(self) -> list[tuple[str, str]]:
        return list(zip(self.servers.addresses, self.servers.versions(), strict=True))

    def _publish(self, policy: Policy, weights: dict[str, Tensor], version: int) -> None:
        self.version = f"{self._name}-{self._run}-{version}"
        self._hold(self._made(policy, weights), version)
        self._give(self.servers.addresses)
        self._forget()

    def _made(self, policy: Policy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to publish."""
        if self._adapters is None:
            return source_weights(policy.module, self._source, weights)
        return self._adapters.policy_weights(policy.module, weights)

    @abstractmethod
    def _hold(self, weights: dict[str, Tensor], version: int) -> None:
        """Keep weights to give, beside those that servers still have."""

    @abstractmethod
    def _give(self, to: Sequence[str]) -> None:
        """Have servers take what is held. StageError if one does not."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was held before: every server has taken the newest."""
