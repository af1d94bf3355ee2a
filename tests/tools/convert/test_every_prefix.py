"""Files whose names lack the prefix that some programs leave out, of every family that has such files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.checkpoint.hf import HfReader
from shared.families import registry

CHOSEN = os.environ.get("FAMILIES", "").split()
TINY = {
    name: replace(size, vocab_size=509)
    for name, size in registry.sizes().items()
    if "tiny" in name and (not CHOSEN or size.family in CHOSEN)
}


def test_files_saved_without_the_prefix_of_their_names(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    """BLOOM, GPT-2 and OPT were published by a program that saved the model without its head."""
    for size in (size for size in TINY if registry.table_of(TINY[size]).optional_prefix):
        source, target, back = (tmp_path / f"{size}.{name}" for name in ("hf", "megatron", "back"))
        write_architecture(source, TINY[size], without_prefix=True)
        prefix = registry.table_of(TINY[size]).optional_prefix
        remote = ["--trust-remote-code"] if registry.FAMILIES[TINY[size].family].remote else []
        assert not any(name.startswith(prefix) for name in HfReader(source).tensors)
        assert convert("to-megatron", "--source", source, "--target", target).code == 0
        answer = convert("verify", "--source", source, "--target", target, *remote)
        assert answer.code == 0, answer.err
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert "problem" not in json.loads(convert("inspect", source, "--json").out)
