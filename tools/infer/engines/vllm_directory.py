"""The directory that vLLM is given: one in which it finds the weights that Baton accounts for, and no others.

Without an index vLLM reads every `*.safetensors`, with one the files that it names, and `consolidated*.safetensors` before all;
transformers, and Baton with it, reads `model.safetensors` first (`choose_weights`).
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from shared.checkpoint.directory.auxiliary_files import unread_weights
from shared.checkpoint.formats.hugging_face import choose_weights

_given: dict[str, Path] = {}  # directory of links -> the model's directory


def directory_for_vllm(source: Path) -> Path:
    """`source`, or a temporary directory of links to its files if vLLM would read others of its weights."""
    chosen = choose_weights(source, "--source")
    unread = set(unread_weights(source, {*chosen.files, *filter(None, [chosen.index])}))
    if not any(name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt")) for name in unread):
        return source
    folder = Path(tempfile.mkdtemp(prefix="baton-infer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for entry in source.iterdir():
        if not {entry.name, f"{entry.name}/"} & unread:
            (folder / entry.name).symlink_to(entry.resolve())
    _given[str(folder)] = source
    return folder


def shown(model: object) -> str:
    """The model's directory as the user gave it, for messages."""
    return str(_given.get(str(model), model))
