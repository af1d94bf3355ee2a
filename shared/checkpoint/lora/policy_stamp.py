"""What a trainer notes in an adapter that it publishes for roll-outs: the policy's version, and the base that it was trained on.

It is in the metadata of adapter_model.safetensors, so that it cannot come apart from the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_VERSION, _BASE = "policy_version", "base_weights"


@dataclass(frozen=True, kw_only=True)
class PolicyStamp:
    """Of one version of a policy.

    Attributes:
        version: its name.
        base: `weights_digest` of the model without the adapter.
    """

    version: str
    base: str

    def metadata(self) -> dict[str, str]:
        """The entries of the file's header."""
        return {_VERSION: self.version, _BASE: self.base}

    @staticmethod
    def of(metadata: Mapping[str, str] | None) -> PolicyStamp | None:
        """That of a file's header; None if it has none."""
        if metadata is None or not {_VERSION, _BASE} <= metadata.keys():
            return None
        return PolicyStamp(version=metadata[_VERSION], base=metadata[_BASE])
