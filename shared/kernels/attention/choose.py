"""The attention of a call: one back end is chosen, the first that carries what the call needs.

Shapes: as in `needs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch

from shared.errors import UserError
from shared.kernels.attention import (
    eager,
    flash_attention_2,
    flash_attention_3,
    sdpa,
    segments,
    te_attention,
    varlen,
)
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.attention.needs import Call, Carries, Needs

type Attend = Callable[[Call], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BackEnd:
    """A way to compute attention."""

    attend: Attend
    carries: Carries
    unavailable: Callable[[], str | None]  # why it cannot be used here at all

    def reasons(self, needs: Needs) -> list[str]:
        """Why it is not used for a call; empty if it can be."""
        found = self.carries.reasons(needs)
        if not found and (reason := self.unavailable()):
            found.append(reason)
        return found


def _back_end(module: object) -> BackEnd:
    return BackEnd(attend=module.attend, carries=module.CARRIES, unavailable=module.unavailable)  # type: ignore[attr-defined]


_MODULES: dict[AttentionBackend, object] = {
    "flash-attn-3": flash_attention_3,
    "sdpa": sdpa,
    "flash-attn-2": flash_attention_2,
    "varlen": varlen,
    "te": te_attention,
    "segments": segments,
    "eager": eager,
}
# In order of preference. SDPA takes cuDNN's kernel where that is the fastest, and has none for packed rows.
BACK_ENDS: dict[AttentionBackend, BackEnd] = {name: _back_end(_MODULES[name]) for name in get_args(AttentionBackend)}


def attend(call: Call, name: AttentionBackend | None = None) -> torch.Tensor:
    """Causal attention, `[B, H, Q, V]`.

    Args:
        call: tensors and features.
        name: the back end; None: chosen.

    Raises:
        UserError: the named back end does not carry the call.
    """
    return BACK_ENDS[choose(call.needs, name)].attend(call)


@lru_cache(maxsize=1024)
def choose(needs: Needs, name: AttentionBackend | None = None) -> AttentionBackend:
    """The first back end that carries `needs`, or the named one. `eager` carries everything.

    Raises:
        UserError: the named back end does not carry it; says which do, and each other's reason.
    """
    reasons = {each: back_end.reasons(needs) for each, back_end in BACK_ENDS.items()}
    if name is None:
        return next(each for each, found in reasons.items() if not found)
    if reasons[name]:
        carrying = [each for each, found in reasons.items() if not found]
        others = [f"{each} ({', '.join(found)})" for each, found in reasons.items() if found and each != name]
        raise UserError(
            f"--attention-backend {name} does not carry this model's attention here: {', '.join(reasons[name])}; "
            f"{' and '.join(carrying)} {'do' if len(carrying) > 1 else 'does'}"
            + (f"; not {', '.join(others)}" if others else "")
        )
    return name
