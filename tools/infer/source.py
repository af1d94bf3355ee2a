"""`--source`: the model's Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoint.directory.open import open_checkpoint


def open_hf_directory(source: Path) -> Path:
    """The directory with the model's files. UserError if a file differs from the manifest."""
    return open_checkpoint(source, kinds=("hf",), flag="--source").hf_files
