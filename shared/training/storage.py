"""What a run reads and writes beside its data: the seam at which a rehearsal takes the place of the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.model import weights
from shared.model.gpt import LanguageModel
from shared.training.recorder import Recorder, SharedRunDirectory, open_run


def read_weights(chunks: Sequence[LanguageModel], iteration_path: Path, source: Path) -> None:
    """Fill the model from a torch_dist directory, of `source`. UserError for what does not fit or is not finite."""
    weights.load(chunks, iteration_path)
    weights.check_finite(chunks, source)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Functions that a run calls; their defaults use the disk."""

    open_run: Callable[..., SharedRunDirectory] = open_run
    read_weights: Callable[[Sequence[LanguageModel], Path, Path], None] = read_weights
    recorder: Callable[..., Recorder] = Recorder


DISK = Storage()
