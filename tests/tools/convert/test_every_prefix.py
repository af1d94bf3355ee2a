"""Tensor names without the model prefix, which some programs omit, for every family with such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.hugging_face import HfReader
from shared.families import registry


def test_files_saved_without_the_prefix_of_their_names(
    tiny_sizes: dict[str, Architecture], write_architecture: Any, convert: Any, remote_code: Any, tmp_path: Path
) -> None:
    """BLOOM, GPT-2 and OPT were published by a program that saved the model without its head."""
    for size, architecture in tiny_sizes.items():
        prefix = next(
            (p for p, others in registry.table_of(architecture).prefix_variants.items() if "" in others), None
        )
        if prefix is None:
            continue
        source, target, back = (tmp_path / f"{size}.{name}" for name in ("hf", "megatron", "back"))
        write_architecture(source, architecture, without_prefix=True)
        assert not any(name.startswith(prefix) for name in HfReader(source).tensors)
        assert convert("to-megatron", "--source", source, "--target", target).code == 0
        answer = convert("verify", "--source", source, "--target", target, *remote_code(architecture))
        assert answer.code == 0, answer.err
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert "problem" not in json.loads(convert("inspect", source, "--json").out)
