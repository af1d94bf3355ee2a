"""What torch's allocator held of the GPU, phase by phase and module by module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run. Bytes."""

    name: str
    before: int  # allocated when it began
    peak: int  # allocated, at most
    reserved: int  # from the GPU, at most: what is allocated, and blocks that are kept or split


class Watch:
    """Watches the allocator of this process."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.kept: dict[str, int] = {}  # bytes by module that the forward pass of a micro batch leaves
        self._name, self._before = "", 0
        self._names: dict[torch.nn.Module, str] = {}
        self._running: list[str] = []
        self._open: list[list[int]] = []  # of each running module: allocated before, kept by modules in it
        self._measured: defaultdict[str, int] = defaultdict(int)
        self.measuring = False

    def begin(self, name: str) -> None:
        """A phase begins, the one before it ends."""
        stats = torch.cuda.memory_stats()
        if self._name:
            self.phases.append(
                Phase(
                    name=self._name,
                    before=self._before,
                    peak=stats["allocated_bytes.all.peak"],
                    reserved=stats["reserved_bytes.all.peak"],
                )
            )
        torch.cuda.reset_peak_memory_stats()
        self._name, self._before = name, stats["allocated_bytes.all.current"]

    @property
    def phase(self) -> str:
        """The one that runs."""
        return self._name

    def module(self) -> str:
        """The innermost module whose forward pass runs; empty outside of one, as in a backward pass."""
        return self._running[-1] if self._running else ""

    def watch(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Follow the modules of a model. Layers are named as over all pipeline stages."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                self._names[module] = re.sub(
                    r"^decoder\.layers\.(\d+)",
                    lambda found, chunk=chunk: f"decoder.layers.{_layer(chunk, int(found[1]))}",
                    name or "model",
                )
        torch.nn.modules.module.register_module_forward_pre_hook(self._enter)
        torch.nn.modules.module.register_module_forward_hook(self._leave)

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        if name := self._names.get(module):
            self._running.append(name)
            if self.measuring:
                self._open.append([torch.cuda.memory_allocated(), 0])

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if name := self._names.get(module):
            # An error leaves the modules open in which it was raised and caught, if it ever is.
            while self._running and self._running.pop() != name:
                pass
            if self.measuring and self._open:
                before, inside = self._open.pop()
                kept = torch.cuda.memory_allocated() - before
                self._measured[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] += kept - inside
                if self._open:
                    self._open[-1][1] += kept
                else:  # the model itself: one micro batch is measured
                    self.measuring, self.kept = False, dict(self._measured)

    def end(self) -> None:
        """The run ends."""
        self.begin("")


def _layer(chunk: Any, index: int) -> int:
    number: int = chunk.decoder.layers[index].layer_number - 1
    return number
