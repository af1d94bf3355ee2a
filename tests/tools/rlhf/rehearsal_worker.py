"""Plays a command of rlhf on a GPU that is not there: rank 0 of a world of so many, in a CUDA runtime of stubs.

Run as `python rehearsal_worker.py FILE WORLD WORDS...` in an environment of `with_stubs`. Writes to `FILE`, as JSON, the exit
code, and on which device and in which dtypes products and attention were computed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from shared.rehearsal import fake_world

fake_world.before_forking()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

COMPUTED = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "embedding", "_fused_adamw_")


class Computed(TorchDispatchMode):
    """Devices and dtypes of what takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname if hasattr(func, "_opname") else func.__name__.partition(".")[0]
        if name in COMPUTED or "attention" in name:
            for each in tree_leaves(args):
                if isinstance(each, torch.Tensor) and each.is_floating_point() and each.dim():
                    self.found.add((name, each.device.type, str(each.dtype).removeprefix("torch.")))
        return func(*args, **(kwargs or {}))


def end_generations(tokens: int) -> None:
    """transformers ends a generation by a number that the GPU computes, which is 0 here: "not finished". Count tokens instead."""
    from transformers import GenerationMixin

    asked = 0

    def unfinished(self: Any, *given: Any, **named: Any) -> bool:
        nonlocal asked
        asked += 1
        return asked % (tokens + 1) != 0

    GenerationMixin._has_unfinished_sequences = unfinished


def main(file: Path, world: int, words: list[str]) -> None:
    fake_world.join(0, world)
    end_generations(next(int(word.rpartition("=")[2]) for word in words if word.startswith("--max-new-tokens=")))
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    from tools.rlhf.cli import tool

    code: Any = None
    with Computed() as computed:
        try:
            tool.run(words)
        except SystemExit as end:
            code = end.code
    peak = torch.cuda.max_memory_allocated()
    file.write_text(json.dumps({"code": code or 0, "computed": sorted(computed.found), "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
