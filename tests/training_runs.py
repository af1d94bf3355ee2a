"""Tiny training runs through a tool's command line: model, exit code, results."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.training.recorder import Recorder

TIMING = {"seconds", "tokens_per_second", "memory_bytes"}


def random_model(directory: Path, model: Architecture, change=lambda chunk: None, seed: int = 5) -> Path:
    """A Megatron directory with random weights, which `change` may alter, and no tokenizer."""
    from megatron.core import dist_checkpointing

    from shared.model import gpt, weights
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups
    from shared.training.state import write_from_threads

    (directory / "release").mkdir(parents=True)
    (directory / "hf").mkdir()
    process_groups.initialize(ParallelConfig(), seed)
    chunks = gpt.build(model, ParallelConfig(), dtype=torch.float32, perform_initialization=True)
    change(chunks[0])
    write_from_threads()
    dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(directory / "release"))
    (directory / "hf" / "config.json").write_text(json.dumps(registry.to_config(model)))
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    return directory


def words(command: str, **options) -> list[str]:
    """A command line; options that are None are left out."""
    return [command, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None)]


def exit_code(tool, line: list[str]) -> int:
    """The exit code of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        tool.run(line)
    return ended.value.code or 0


@contextlib.contextmanager
def signalled(number: int, *, after: int) -> Iterator[None]:
    """Context manager: a run in this process gets a signal right after an update."""
    plain = Recorder.updated

    def updated(self, step, *numbers):
        plain(self, step, *numbers)
        if step == after:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "updated", updated)
        yield


def record(directory: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine decide."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last iteration."""
    from megatron.core import dist_checkpointing

    tracker = (directory / "latest_checkpointed_iteration.txt").read_text()
    name = tracker if tracker == "release" else f"iter_{int(tracker):07d}"
    loaded = dist_checkpointing.load_plain_tensors(str(directory / name))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
