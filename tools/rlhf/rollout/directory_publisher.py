"""The policy as a directory that servers of `infer rollouts` take over: `POLICIES/TARGET-KEY/VERSION/model.safetensors`.

The servers read it under the same path. It is there until the next one has been taken, for a server that is restarted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
from tools.rlhf.rollout.server_publisher import ServerPublisher, run_name
from tools.rlhf.rollout.servers import Servers


@contextmanager
def run_folder(policies: Path, target: Path) -> Iterator[Path]:
    """Make the folder of a target's run, without what a killed process has left; remove it at the end.

    Raises:
        UserError: `policies` cannot be written.
    """
    folder = Path(os.path.abspath(policies)) / run_name(target)

    def make() -> None:
        try:
            remove_tree(folder)
            folder.mkdir()
        except OSError as error:
            raise UserError(f"--policies {policies} cannot be written: {error.strerror or error}") from None

    on_rank_0(make)
    try:
        yield folder
    finally:
        if torch.distributed.get_rank() == 0:
            remove_tree(folder)


class DirectoryPublisher(ServerPublisher):
    """Writes the policy, and has the servers read it."""

    def __init__(self, folder: Path, source: Source, servers: Servers, adapters: Adapters | None = None) -> None:
        """`folder` is the run's own, below the servers' `--policies`; see `run_folder`. Adapters are published merged."""
        super().__init__(folder.name, source, servers, adapters)
        self._folder = self._path = self._before = folder

    @classmethod
    @contextmanager
    def open(
        cls, policies: Path, target: Path, source: Source, servers: Servers, adapters: Adapters | None = None
    ) -> Iterator[DirectoryPublisher]:
        """A publisher into the run's folder."""
        with run_folder(policies, target) as folder:
            yield cls(folder, source, servers, adapters)

    def _hold(self, weights: dict[str, Tensor], version: int) -> None:
        self._before, self._path = self._path, self._folder / str(version)
        partial = self._path.with_name(f"{version}{PARTIAL}")
        for leftover in (partial, self._path):
            remove_tree(leftover)
        partial.mkdir()
        self._write(partial, weights)
        partial.rename(self._path)

    def _write(self, directory: Path, weights: dict[str, Tensor]) -> None:
        stored = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})

    def _give(self, to: Sequence[str]) -> None:
        self._offer(self._path, to)

    def _offer(self, directory: Path, to: Sequence[str]) -> None:
        self.servers.publish(directory, self.version, to=to)

    def _forget(self) -> None:
        if self._before not in (self._folder, self._path):
            remove_tree(self._before)
