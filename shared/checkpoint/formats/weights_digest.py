"""The identity of a model's weights: equal for equal tensors, however files hold them."""

from __future__ import annotations

from pathlib import Path

import xxhash

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.formats.hugging_face import stored_weights


def weights_digest(directory: Path, flag: str = "--source") -> str:
    """XXH3 (128 bits, hexadecimal) of name, dtype, shape and bytes of every tensor of a Hugging Face directory.

    Reads every byte. It tells models apart that differ by mistake; it is no protection against forgery.
    """
    tensors = stored_weights(directory, flag).tensors()
    digest = xxhash.xxh3_128()
    with OpenFiles() as files:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for block in files.blocks(tensor.file, tensor.start, tensor.size, 1):
                digest.update(block)
    return digest.hexdigest()
