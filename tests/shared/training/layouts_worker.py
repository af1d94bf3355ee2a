"""One rank of a world of two: resumes a one-process run in every layout, then each layout's own checkpoint.

Run as `python layouts_worker.py DIRECTORY`: for each of two models, reads `DIRECTORY/<model>/one`, saved by one process
after update 3, and writes `DIRECTORY/<model>/<layout>` after update 5 and, from rank 0, `DIRECTORY/results.json`.
"""

import json
import sys
from pathlib import Path

from shared.runtime.launch import launch
from shared.runtime.silence_warnings import silence

_ALONE = ("tensor", "pipeline")  # of MTP they test nothing that the others do not
LAYOUTS = {
    "data": {},
    "tensor": {"tensor": 2},
    "tensor_and_sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline": {"pipeline": 2},
    "virtual_pipeline": {"pipeline": 2, "virtual_pipeline": 2},
}


def layouts_of(model: str) -> list[str]:
    """Those that a model is run at."""
    return [name for name in LAYOUTS if model == "plain" or name not in _ALONE]


class Session:
    """A model in a layout, from a saved state."""

    learning_rate = 1e-2

    def __init__(
        self, config, architecture, directory: Path, restore=True, trainable=None, data=None, backend=None
    ) -> None:
        """`backend`: by default that of the configuration."""
        import torch

        from shared.model import gpt, weights
        from shared.runtime import process_groups
        from shared.training import state
        from shared.training.loop import backend_of, model_overrides
        from shared.training.optimizer import build_optimizer, wrap
        from shared.training.trainable import FULL

        self.config = config
        self.data = Words() if data is None else data
        self.device = process_groups.initialize(config.parallel, 1)
        overrides = model_overrides(config)
        chunks = gpt.build(
            architecture,
            config.parallel,
            dtype=torch.float32,
            recompute=config.recompute,
            backend=backend or backend_of(config, architecture)[0],
            **overrides,
        )
        weights.load(chunks, directory)
        (trainable or FULL).apply(chunks)
        self.model = wrap(chunks, overlap=config.overlap)
        self.optimizer = build_optimizer(config, self.model)
        if restore:
            state.load(directory, self.model, self.optimizer, fp8=config.fp8)

    def train(self, first: int, last: int) -> list[list[float]]:
        """Loss, MTP loss (0 without MTP) and gradient norm of updates `first` to `last`, from 0."""
        from shared.training import fp8_update
        from shared.training.balance import take_balance
        from shared.training.loop import forward_backward
        from shared.training.optimizer import set_learning_rate

        rows: list[list[float]] = []
        self.balances, self.fp8 = [], []  # of the last call's updates
        for step in range(first, last):
            first_sample = step * self.config.global_batch_size
            loss = forward_backward(self.config, self.model, self.data, first_sample, self.device)
            balance = take_balance(self.config, self.model, self.device)
            self.balances.append(balance.row() if balance else {})
            set_learning_rate(self.optimizer, self.learning_rate)
            _, norm, _ = self.optimizer.step()
            if self.config.fp8:
                self.fp8.append(fp8_update.end_update(self.model, self.device))
            rows.append([loss.mean, loss.mtp or 0.0, float(norm)])
        return rows

    def validate(self) -> float:
        """Mean loss over eleven samples: no multiple of any batch."""
        from shared.training.loop import validate

        return validate(self.config, self.model, self.data, self.device).mean

    def save(self, directory: Path, step: int) -> None:
        """The state, in an empty directory."""
        import torch

        from shared.training import state

        if torch.distributed.get_rank() == 0:
            directory.mkdir()
        torch.distributed.barrier()
        state.save(directory, self.model, self.optimizer, step=step)


class Words:
    """Samples that repeat a few words: learnable."""

    sequence_length = 24

    def __len__(self) -> int:
        return 11

    def batch(self, positions):
        """Rows of multiples, of which every position has its own. Padding counts in the balance of experts only."""
        import torch

        from shared.training.data import Batch

        samples = torch.stack([(torch.arange(25) * (1 + int(position) % 11)) % 13 for position in positions])
        padding = torch.stack([torch.arange(24) >= 24 - int(position) % 11 for position in positions])
        return Batch(tokens=samples[:, :-1].clone(), labels=samples[:, 1:].clone(), padding=padding)


def main() -> None:
    """Every layout, one after another, in the same two processes."""
    code = launch(2)
    if code is not None:
        raise SystemExit(code)
    silence()
    import torch

    directory = Path(sys.argv[1])
    results = {}
    for folder in ("plain", "mtp"):
        results[folder] = run(directory / folder)
        if folder == "plain":
            results["dropout"] = dropout(directory / folder)
        if torch.distributed.get_rank() == 0:
            (directory / "results.json").write_text(json.dumps(results))


def run(directory: Path) -> dict:
    """One model's results, by layout."""
    from shared.architecture import dictionary
    from shared.parallel import ParallelConfig
    from shared.training.config import TrainingConfig

    given = json.loads((directory / "run.json").read_text())
    architecture = dictionary.read(given["architecture"])
    results = {}
    for name in layouts_of(directory.name):
        parallel = ParallelConfig(processes=2, **LAYOUTS[name])
        config = TrainingConfig(**{**given["config"], "parallel": parallel})
        session = Session(config, architecture, directory / "one")
        found = {"validation": session.validate(), "resumed_from_one_process": session.train(3, 5)}
        session.save(directory / name, step=5)
        found["continued"] = session.train(5, 7)
        found["restored"] = Session(config, architecture, directory / name).train(5, 7)
        results[name] = found
    return results


def dropout(directory: Path) -> dict:
    """Uneven stages of a model with dropout, resumed at the same stages and at others."""
    import torch

    from shared.architecture import dictionary
    from shared.parallel import ParallelConfig
    from shared.training.config import TrainingConfig

    given = json.loads((directory / "run.json").read_text())
    architecture = dictionary.read(given["architecture"]).with_values(residual={"dropout": 0.2})

    def session(layers: tuple[int, int], iteration: Path, *, restore: bool = True) -> Session:
        parallel = ParallelConfig(processes=2, pipeline=2, pipeline_layers=layers)
        return Session(
            TrainingConfig(**{**given["config"], "parallel": parallel}), architecture, iteration, restore=restore
        )

    first = session((1, 3), directory / "one")
    first.train(3, 4)
    first.save(directory / "uneven", step=4)
    kept, continued = torch.get_rng_state(), first.train(4, 5)
    restored = session((1, 3), directory / "uneven").train(4, 5)
    session((3, 1), directory / "uneven", restore=False)
    seeded = torch.get_rng_state()
    other = session((3, 1), directory / "uneven")
    states = [torch.equal(torch.get_rng_state(), each) for each in (seeded, kept)]
    return {"continued": continued, "restored": restored, "seeded, kept": states, "other": other.train(4, 5)}


if __name__ == "__main__":
    main()
