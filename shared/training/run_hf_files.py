"""Auxiliary files of a run: the source's, and the dataset's tokenizer if the source has none."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.data.tokenizer import copy_tokenizer
from shared.training.plan import Inputs


@contextlib.contextmanager
def run_hf_files(inputs: Inputs) -> Iterator[Path]:
    """Context manager: a directory with the auxiliary files (config.json, tokenizer, ...)."""
    own, tokenizer = inputs.source.hf_files, inputs.data[0].tokenizer
    if (own / "tokenizer.json").is_file() or not tokenizer.is_dir():
        yield own
        return
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "hf"
        copy_tokenizer(tokenizer, merged)
        shutil.copytree(own, merged, dirs_exist_ok=True)  # the source's own files win
        yield merged
