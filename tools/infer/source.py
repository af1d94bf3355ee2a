"""`--source`: the model's Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.formats.hugging_face import check_not_left_over
from shared.console import log
from shared.weight_account import account_for_weights


def open_hf_directory(source: Path) -> Path:
    """The directory with the model's files. UserError if it is not read as it is."""
    directory = open_checkpoint(source, kinds=("hf",), flag="--source").hf_files
    check_not_left_over(directory, f"--source {source}")
    return directory


def check_weights(source: Path) -> None:
    """Account for the directory's tensors. UserError if one is missing, unknown or misshapen."""
    if not account_for_weights(source, f"--source {source}"):
        log(f"{source}: no table of its tensors is known here, so the engine alone checks that all are there")
