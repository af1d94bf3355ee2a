"""Weights exchanged in vLLM's workers, after the server has checked them (`tools/infer/weight_check.py`).

`WeightSwap` is mixed into vLLM's worker class (`worker_extension_cls`): its methods are called in every worker through
`collective_rpc`. It imports no vLLM, which loads it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


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

        model = self.get_model()
        forget_packed_experts(model)
        with unloaded() as said:
            self.reload_weights(weights_iterator=tensors())
        if missed := said & {type(layer).__name__ for layer, tied in with_parameters(model) if not tied}:
            raise RuntimeError(f"vLLM has not loaded the weights of {', '.join(sorted(missed))}")
        pack_tied_heads(model)


def with_parameters(model: Any) -> Iterator[tuple[Any, bool]]:
    """Layers with parameters, and whether all of these are a layer's before them, as a tied head's are."""
    seen: set[int] = set()
    for layer in model.modules():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if own:
            yield layer, own <= seen
        seen |= own


def forget_packed_experts(model: Any) -> None:
    """Before a reload: have vLLM pack the experts for its CPU kernel again.

    It packs them where it makes the kernel, and makes that once: a reload writes weights as they are stored into the place of
    packed ones.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and on_cpu():
            method.moe_kernel = None


def pack_tied_heads(model: Any) -> None:
    """After a reload: pack the weights of a tied head for the CPU again.

    vLLM does so for layers that it has loaded. A head that shares the embedding's weights is not loaded itself, and
    multiplies by a copy that was packed of the old ones.
    """
    for layer, tied in with_parameters(model):
        if tied and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


@contextmanager
def unloaded() -> Iterator[set[str]]:
    """Classes of layers of which vLLM's reload says that they keep what they had: weights, or only buffers."""
    found: set[str] = set()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == "%s: Failed to load weights" and isinstance(record.args, tuple):
                found.add(str(record.args[0]))

    logger, listener = logging.getLogger(RELOAD_LOGGER), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)  # `infer` shows vLLM's errors only
    try:
        yield found
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
