"""--source: the Hugging Face directory that every command reads."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoint.directory.open import open_checkpoint


def open_hf_directory(source: Path) -> Path:
    """The model's files, once their content matches the manifest. UserError names the file that does not."""
    return open_checkpoint(source, kinds=("hf",), flag="--source").hf_files
