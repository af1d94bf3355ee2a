"""Trains models in worlds of several processes and resumes each from its own checkpoint.

Run as `python cases_worker.py DIRECTORY`: reads `DIRECTORY/cases.json`, cases by name. A case has the number of processes,
the run's configuration, the architecture, the layout, patterns of frozen weights (or none), a checkpoint of one process
before update 1 (`start`) and one after update 3 (`one_process`, or null). Writes checkpoints `DIRECTORY/<case>/1` and `3`,
after these updates, and `DIRECTORY/results.json`.

Worlds are forked from this process: torch and Megatron-Core are imported once.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from shared.runtime.silence_warnings import silence

silence()

import torch  # noqa: E402

from shared.architecture import dictionary  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.training import loop  # noqa: E402, F401 -- imported before the fork
from shared.training.config import TrainingConfig  # noqa: E402
from shared.training.trainable import FULL, Frozen  # noqa: E402
from tests.workers import forked_world  # noqa: E402

specification = importlib.util.spec_from_file_location("session", Path(__file__).with_name("layouts_worker.py"))
session = importlib.util.module_from_spec(specification)
specification.loader.exec_module(session)


def run(directory: Path, case: dict) -> dict:
    """Loss, MTP loss and gradient norm of each update, and what the optimizers of each rank are made of."""
    parallel = ParallelConfig(processes=case["processes"], **case["layout"])
    config = TrainingConfig(**{**case["config"], "parallel": parallel})
    architecture = dictionary.read(case["architecture"])
    trainable = Frozen(tuple(case["frozen"])) if case["frozen"] else FULL

    def start(checkpoint: Path, restore: bool = True):
        return session.Session(config, architecture, checkpoint, restore=restore, trainable=trainable)

    first = start(Path(case["start"]), restore=False)
    results = {"first": first.train(0, 1), "balance": first.balances[0]}
    first.save(directory / "1", step=1)
    if case["updates"] > 1:
        results["first"] += first.train(1, 3)
        first.save(directory / "3", step=3)
        results["continued"] = first.train(3, 5)
        results["resumed"] = start(directory / "3").train(3, 5)
    if case["one_process"]:
        results["resumed_from_one_process"] = start(Path(case["one_process"])).train(3, 5)
    parts = first.optimizer.chained_optimizers
    groups = [group for part in parts for group in part.param_groups]
    ranks = [None] * case["processes"]
    torch.distributed.all_gather_object(
        ranks,
        {
            "parameters": [len(part.get_parameters()) for part in parts],
            "steps": [sorted({float(state["step"]) for state in part.optimizer.state.values()}) for part in parts],
            "fused": all(group["fused"] for group in groups),
            "weight_decays": sorted({group["weight_decay"] for group in groups}),
        },
    )
    return {**results, "ranks": ranks}


def worker(rank: int, directory: Path, cases: dict) -> None:
    """One rank of a world: its cases, one after another."""
    results = {name: run(directory / name, case) for name, case in cases.items()}
    if rank == 0:
        (directory / f"{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(results))


def main(directory: Path) -> None:
    cases = json.loads((directory / "cases.json").read_text())
    results = {}
    for processes in sorted({case["processes"] for case in cases.values()}):
        chosen = {name: case for name, case in cases.items() if case["processes"] == processes}
        if not forked_world(processes, worker, directory, chosen):
            sys.exit(1)
        results |= json.loads((directory / f"{processes}.json").read_text())
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
