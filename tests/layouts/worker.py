"""Trains the models of the table in its layouts, each world in processes forked from this one.

A cell resumes one process's checkpoint, after update 1. Compared: update 2 with that of one process (loss, MTP loss, gradient
norm, all gradients); update 3 with that of a resume in the same layout, and of a resume by one process.

Run as `python worker.py DIRECTORY`: reads `DIRECTORY/cells.json`, models by layout, and writes `DIRECTORY/results.json`,
figures by layout and model.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.runtime.silence_warnings import silence

silence()

import torch  # noqa: E402

from shared.data.labels import IGNORE  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.training import loop, state  # noqa: E402, F401 -- imported before the fork
from shared.training.config import TrainingConfig  # noqa: E402
from shared.training.data import Batch  # noqa: E402
from tests.layouts.cases import LAYOUTS, LENGTH, MODELS, ONE_SEGMENT, VOCABULARY  # noqa: E402
from tests.shared.training.layouts_worker import Session  # noqa: E402
from tests.workers import forked_world  # noqa: E402

Figures = dict[str, Any]
_SAMPLES = 16


class Rows:
    """Random rows, three tenths of their labels ignored; packed: in four segments, the last of them padding."""

    sequence_length = LENGTH

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return _SAMPLES

    def batch(self, positions: Iterable[int]) -> Batch:
        tokens, labels, segments = zip(*(self._sample(int(position)) for position in positions), strict=True)
        return Batch(
            tokens=torch.stack(tokens),
            labels=torch.stack(labels),
            segments=torch.stack(segments) if self.packed else None,
        )

    def _sample(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + position % _SAMPLES)
        row = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
        labels = row[1:].clone()
        labels[torch.rand(LENGTH, generator=generator) < 0.3] = IGNORE
        borders = torch.randperm(LENGTH - 1, generator=generator)[:3] + 1
        segments = (torch.arange(LENGTH)[:, None] >= borders).sum(1) + 1
        if self.packed:
            labels[segments == 4] = IGNORE
        return row[:-1], labels, segments % 4


def config(parallel: ParallelConfig) -> TrainingConfig:
    return TrainingConfig(
        steps=10,
        sequence_length=LENGTH,
        micro_batch_size=2,
        global_batch_size=8,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        weight_decay=0.1,
        mtp_loss_scaling_factor=0.1,
        clip_grad=1.0,
        adam_beta1=0.0,  # the first moment is the gradient of the last update
        adam_beta2=0.95,
        seed=1,
        precision="fp32",
        fp8=None,
        recompute=("none",),
        moe_router_bias_update_rate=1e-3,
        parallel=parallel,
        save_every=1000,
        keep=1,
        async_save=False,
        log_every=1,
        validate_every=0,
        validation_sequences=8,
        backend=None,
        attention_backend=None,
        overlap=True,
    )


def session(model: str, parallel: ParallelConfig, directory: Path, *, restore: bool = True) -> Session:
    data = Rows(packed=model not in ONE_SEGMENT)
    return Session(config(parallel), MODELS[model], directory, restore=restore, data=data)


def one_process(rank: int, directory: Path, models: list[str]) -> None:
    """Each model's checkpoints after updates 1 and 2, and the figures of update 2."""
    found = {}
    for model in models:
        folder = directory / model
        folder.mkdir()
        random_weights(folder / "0", model)
        here = session(model, ParallelConfig(), folder / "0", restore=False)
        here.train(0, 1)
        here.save(folder / "1", step=1)
        (found[model],) = here.train(1, 2)
        here.save(folder / "2", step=2)
    (directory / "one.json").write_text(json.dumps(found))


def random_weights(directory: Path, model: str) -> None:
    from megatron.core import dist_checkpointing

    from shared.model import gpt, weights
    from shared.runtime import process_groups

    directory.mkdir()
    process_groups.initialize(ParallelConfig(), 5)
    chunks = gpt.build(MODELS[model], ParallelConfig(), dtype=torch.float32, perform_initialization=True)
    state.write_from_threads()
    dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(directory))


def layout_ranks(rank: int, directory: Path, layout: str, models: list[str]) -> None:
    """One rank of a layout's world: its models, one after another."""
    parallel, found = LAYOUTS[layout], {}
    for model in models:
        folder = directory / model
        here = session(model, parallel, folder / "1")
        (second,) = here.train(1, 2)
        here.save(folder / layout, step=2)
        (third,) = here.train(2, 3)
        (resumed,) = session(model, parallel, folder / layout).train(2, 3)
        found[model] = {"second": second, "third": third, "resumed": resumed}
        if rank == 0:
            (directory / "ranks.json").write_text(json.dumps(found))


def compare(rank: int, directory: Path, layout: str) -> None:
    """One process resumes the layout's checkpoints and compares figures and gradients with its own."""
    ranks, one = (json.loads((directory / f"{name}.json").read_text()) for name in ("ranks", "one"))
    found: dict[str, Figures] = {}
    for model, cell in ranks.items():
        folder = directory / model
        (resumed,) = session(model, ParallelConfig(), folder / layout).train(2, 3)
        found[model] = {
            "update": apart(cell["second"], one[model]),
            "gradients": gradients_apart(folder / layout, folder / "2"),
            "resumes equal": cell["resumed"] == cell["third"],
            "resumed by one process": apart(resumed, cell["third"]),
        }
        shutil.rmtree(folder / layout)
    (directory / "compared.json").write_text(json.dumps(found))


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(ours, theirs, strict=True))


def gradients_apart(ours: Path, theirs: Path) -> float:
    """The largest relative difference, of norms, of a weight's gradients and of correction biases."""
    from megatron.core import dist_checkpointing

    a, b = (dist_checkpointing.load_plain_tensors(str(path)) for path in (ours, theirs))
    assert a.keys() == b.keys()
    names = [name for name in b if "exp_avg." in name or name.endswith("expert_bias")]
    return max(_difference(a[name], b[name]) for name in names)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    rows = min(len(a), len(b))  # the vocabulary's padding depends on TP
    return float((a[:rows] - b[:rows]).norm() / b.norm().clamp(min=1e-12))


def run(directory: Path, layout: str, models: list[str]) -> dict[str, Figures]:
    """Figures of the layout's cells; empty for those that an error prevented. `one_process` must have run."""
    found: dict[str, Figures] = {}
    while remaining := [model for model in models if model not in found]:
        for name in ("ranks.json", "compared.json"):
            (directory / name).unlink(missing_ok=True)
        for model in remaining:
            shutil.rmtree(directory / model / layout, ignore_errors=True)
        forked_world(LAYOUTS[layout].processes, layout_ranks, directory, layout, remaining)
        trained = json.loads((directory / "ranks.json").read_text()) if (directory / "ranks.json").exists() else {}
        if trained and forked_world(1, compare, directory, layout):
            found |= json.loads((directory / "compared.json").read_text())
        # An error ends a world: its models go on in another, without that one.
        tried = [*trained, *(model for model in remaining[: len(trained) + 1] if model not in trained)]
        found |= {model: {} for model in tried if model not in found}
    return found


def main(directory: Path) -> None:
    cells = json.loads((directory / "cells.json").read_text())
    models = [model for model in MODELS if any(model in chosen for chosen in cells.values())]
    if not forked_world(1, one_process, directory, models):
        sys.exit(1)
    (directory / "results.json").write_text(
        json.dumps({layout: run(directory, layout, chosen) for layout, chosen in cells.items()})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
