"""The options of `evaluate-text`, in infer and in pretrain. Standard library and pydantic only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.cli import Existing, Positive


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text is measured, and how: `shared.data.text_windows`.

    Attributes:
        text: text or JSON-lines files (also .gz, .zst) or folders of them, separated by commas.
        target: the directory to publish.
        text_key: the key of the text in rows.
        window: tokens that a forward pass reads; by default the model's context less 2, at most 2048.
        stride: tokens that a window after the first predicts; by default the whole window, and its tokens have the least
            context. Smaller is slower, and measures with more context.
        overwrite: replace what is published at the target.
    """

    text: tuple[Existing, ...]
    target: Path
    text_key: str = "text"
    window: Positive | None = None
    stride: Positive | None = None
    overwrite: bool = False
