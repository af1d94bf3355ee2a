"""Trains models in worlds of several processes, with and without overlap of communication and computation.

Run as `python overlap_worker.py DIRECTORY`: reads `DIRECTORY/cases.json`, as `cases_worker.py` does. Writes
`DIRECTORY/<case>/plain` and `overlap`, each the state after update 1, and `DIRECTORY/results.json`.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

specification = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases_worker.py"))
cases = importlib.util.module_from_spec(specification)
specification.loader.exec_module(cases)

import torch  # noqa: E402

from shared.architecture import dictionary  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.training import optimizer  # noqa: E402
from shared.training.config import TrainingConfig  # noqa: E402

BUCKET = 5_000  # parameters: several buckets in a tiny model
wrap = optimizer.wrap


def run(directory: Path, case: dict) -> dict:
    """Each update and validation, the same of a resumed run, the number of buckets, and that of weights which saving changed:
    they were old.
    """
    parallel = ParallelConfig(processes=case["processes"], **case["layout"])
    optimizer.wrap = partial(wrap, bucket_size=BUCKET)
    results = {}
    for name, overlap in (("plain", False), ("overlap", True)):
        config = TrainingConfig(**{**case["config"], "parallel": parallel, "overlap": overlap})
        architecture = dictionary.read(case["architecture"])
        made = cases.session.Session(config, architecture, Path(case["start"]), restore=False)
        rows = made.train(0, 1)
        weights = [weight for chunk in made.model for weight in chunk.parameters()]
        before = [weight.detach().clone() for weight in weights]
        made.save(directory / name, step=1)
        old = sum(not torch.equal(*pair) for pair in zip(before, weights, strict=True))
        rows += made.train(1, 2)
        validation = made.validate()
        rows += made.train(2, 3)
        resumed = cases.session.Session(config, architecture, directory / name).train(1, 3)
        groups = [len(chunk.bucket_groups) for chunk in made.model]
        everyones = [None] * case["processes"]
        torch.distributed.all_gather_object(everyones, (old, groups))
        results[name] = {
            "rows": rows,
            "resumed": resumed,
            "validation": validation,
            "old_weights": sum(count for count, _ in everyones),
            "buckets": max(count for _, counts in everyones for count in counts),
        }
    return results


if __name__ == "__main__":
    cases.run = run
    cases.main(Path(sys.argv[1]))
