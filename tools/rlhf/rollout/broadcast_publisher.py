"""The policy as a broadcast of torch.distributed to the servers, without a file between them.

Rank 0 holds what it has sent, for a server that is restarted, until it sends the next: a copy of the policy in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tools.rlhf.rollout.server_publisher import ServerPublisher


class BroadcastPublisher(ServerPublisher):
    """Sends to servers that were started with `--broadcasts`."""

    _held: dict[str, Tensor]

    def _hold(self, weights: dict[str, Tensor], version: int) -> None:
        self._held = weights

    def _give(self, to: Sequence[str]) -> None:
        self.servers.versions()  # a server that is being restarted is waited for
        self.servers.broadcast(self._held, self.version, to=to)

    def _forget(self) -> None:
        """Does nothing: `_hold` replaced the older weights."""
