"""The policy as a directory that servers of `infer rollouts` take over: `POLICIES/TARGET-KEY/VERSION/model.safetensors`.

The servers read it under the same path. It is there until the next one has been taken, for a server that is restarted.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.checkpoint.directory.target import PARTIAL
from shared.checkpoint.files import remove_tree
from shared.errors import UserError
from shared.runtime.agreement import on_rank_0
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.published_directory import source_weights
from tools.rlhf.rollout.publisher import Policy
from tools.rlhf.rollout.servers import Servers


class DirectoryPublisher:
    """The `Publisher` of `ServerSampler`. Rank 0 writes, and speaks with the servers."""

    def __init__(self, folder: Path, source: Source, servers: Servers, adapters: Adapters | None = None) -> None:
        """`folder` is the run's own, below the servers' `--policies`. Adapters are published merged."""
        self._adapters, self._folder, self._source, self._servers = adapters, folder, source, servers
        self._run = secrets.token_hex(4)  # a policy of an earlier process of this run is not taken for this one's
        self._version = ""
        self._path = folder

    @classmethod
    @contextmanager
    def open(
        cls, policies: Path, target: Path, source: Source, servers: Servers, adapters: Adapters | None = None
    ) -> Iterator[DirectoryPublisher]:
        """Make the run's folder, without what a killed process has left; remove it at the end.

        Raises:
            UserError: `policies` cannot be written.
        """
        # The target's lock makes this process the only one with the folder of its path.
        key = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:8]
        folder = Path(os.path.abspath(policies)) / f"{target.name}-{key}"

        def make() -> None:
            try:
                remove_tree(folder)
                folder.mkdir()
            except OSError as error:
                raise UserError(f"--policies {policies} cannot be written: {error.strerror or error}") from None

        on_rank_0(make)
        try:
            yield cls(folder, source, servers, adapters)
        finally:
            if torch.distributed.get_rank() == 0:
                remove_tree(folder)

    def publish(self, policy: Policy, version: int) -> None:
        """See `Publisher`. StageError if a server does not take the weights."""
        weights = policy.full_weights()
        on_rank_0(lambda: self._publish(policy, weights, version))

    def assure(self) -> None:
        """Have every server answer with the version that was published last; rank 0 only."""
        if behind := [address for address, found in self._found() if found != self._version]:
            self._servers.publish(self._path, self._version, to=behind)

    def wrong(self) -> str:
        """The first server that does not answer with the version that was published last, in words; rank 0 only."""
        for address, found in self._found():
            if found != self._version:
                return f"--rollouts {address} answers with policy {found!r}, where {self._version!r} was published"
        return ""

    def _found(self) -> list[tuple[str, str]]:
        return list(zip(self._servers.addresses, self._servers.versions(), strict=True))

    def _publish(self, policy: Policy, weights: dict[str, Tensor], version: int) -> None:
        before, self._path = self._path, self._folder / str(version)
        self._version = f"{self._folder.name}-{self._run}-{version}"
        partial = self._path.with_name(f"{version}{PARTIAL}")
        for leftover in (partial, self._path):
            remove_tree(leftover)
        partial.mkdir()
        if self._adapters is None:
            made = source_weights(policy.module, self._source, weights)
        else:
            made = self._adapters.policy_weights(policy.module, weights)
        stored = {name: tensor.contiguous() for name, tensor in made.items()}
        save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(self._path)
        self._servers.publish(self._path, self._version, to=self._servers.addresses)
        if before not in (self._folder, self._path):
            remove_tree(before)
