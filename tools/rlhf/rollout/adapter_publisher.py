"""The policy as a LoRA adapter that servers of `infer rollouts --lora-rank` load: PEFT's `POLICIES/TARGET-KEY/VERSION`.

The servers hold the source, and compute each version by its own name: a request never gets another version than it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.checkpoint.lora.policy_stamp import PolicyStamp
from shared.errors import UserError
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.rollout.directory_publisher import DirectoryPublisher
from tools.rlhf.rollout.publisher import Policy
from tools.rlhf.rollout.servers import Served, Servers


class AdapterPublisher(DirectoryPublisher):
    """Writes the adapters, and has the servers load them."""

    def __init__(self, folder: Path, source: Source, servers: Servers, adapters: Adapters, *, base: str) -> None:
        """As `DirectoryPublisher`; `base` is `weights_digest` of the source."""
        super().__init__(folder, source, servers, adapters)
        self._trained, self._base = adapters, base

    def requested(self, served: str) -> str:
        """The version: servers know each by its own name."""
        return self.version

    def _made(self, policy: Policy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._trained.tensors(policy.module, weights)

    def _write(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        stamp = PolicyStamp(version=self.version, base=self._base)
        self._trained.write(directory, tensors, target=directory, tokenizer_files=False, stamp=stamp)

    def _offer(self, directory: Path, to: Sequence[str]) -> None:
        self.servers.publish_adapter(directory, self.version, to=to)


def checked_base(addresses: Sequence[str], served: Sequence[Served], adapters: Adapters) -> str:
    """`weights_digest` of the source, which reads it whole; rank 0 only.

    Raises:
        UserError: a server has no room for the adapters, or another model than the source; they are of stacked experts.
    """
    if parameters := adapters.stacked:
        raise UserError(
            f"--publish-by adapter: vLLM loads no adapters of stacked experts ({parameters[0]}); leave them out of "
            "--lora-targets, or publish merged policies by directory or broadcast"
        )
    rank = adapters.settings.rank
    for address, said in zip(addresses, served, strict=True):
        if said.lora_rank < rank:
            room = f"room for adapters of rank {said.lora_rank}" if said.lora_rank else "no room for adapters"
            raise UserError(
                f"--publish-by adapter: --rollouts {address} has {room}; start `infer rollouts` with --lora-rank {rank} or more"
            )
    base = weights_digest(adapters.source.path)
    for address, said in zip(addresses, served, strict=True):
        if said.base != base:
            raise UserError(
                f"--publish-by adapter: --rollouts {address} has other weights than --source {adapters.source.path}; start it "
                "from the same directory"
            )
    return base
