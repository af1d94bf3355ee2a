"""Weights exchanged in vLLM's workers, after the server has checked them (`tools/infer/weight_check.py`).

`WeightSwap` is mixed into vLLM's worker class (`worker_extension_cls`): its methods are called in every worker through
`collective_rpc`. It imports no vLLM, which loads it by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any


class WeightSwap:
    """Two steps, so that no worker exchanges its weights where another one cannot."""

    path = f"{__module__}.WeightSwap"

    def baton_open(self, files: Sequence[tuple[str, int, int]]) -> str:
        """Open the files; "", or the reason why this worker cannot read them.

        Args:
            files: path, bytes and time of modification (ns) of each, as checked.
        """
        from safetensors import safe_open

        opened = ExitStack()
        try:
            stored = []
            for name, size, modified in files:
                state = Path(name).stat()
                if (state.st_size, state.st_mtime_ns) != (size, modified):
                    return f"path {name} has changed since it was checked"
                stored.append(opened.enter_context(safe_open(name, "pt")))
        except OSError as error:
            return f"path {error.filename or name} cannot be read by a worker: {error.strerror or error}"
        self.baton_files = stored  # mapped into memory: a file that is deleted from now on is still read
        return ""

    def baton_swap(self: Any) -> None:
        """Load the weights of the open files, a tensor at a time. An exception leaves the model undefined."""
        stored = self.__dict__.pop("baton_files")

        def tensors() -> Iterator[tuple[str, Any]]:
            for file in stored:
                for name in file.keys():  # noqa: SIM118 -- no mapping
                    yield name, file.get_tensor(name)

        self.reload_weights(weights_iterator=tensors())
