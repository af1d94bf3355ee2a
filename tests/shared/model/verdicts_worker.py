"""Runs layouts in Megatron-Core without our layout rules.

Run as `python verdicts_worker.py DIRECTORY`: reads `DIRECTORY/cases.json`, cases by name: an architecture, the fields of
a layout, tokens of a row, micro batches of an update. Writes `DIRECTORY/results.json`: the error of each case, or null.

The process is rank 0 of a world of any size without other processes: torch's `fake` backend keeps the shapes of
collectives and moves no data.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from shared.runtime.silence_warnings import silence  # noqa: E402

silence()

import torch  # noqa: E402

import shared.runtime.device  # noqa: E402

shared.runtime.device.select_device()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

# Importing it registers the `fake` backend. Private, but the only one that needs no other processes.
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from shared.architecture import dictionary  # noqa: E402
from shared.model import gpt  # noqa: E402
from shared.model.prefix_lm import with_blank  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime import process_groups  # noqa: E402


def world(processes: int) -> None:
    """Become rank 0 of a world of this size."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)


def attempt(case: dict) -> str | None:
    """The error of building the model and, with one stage, of a forward and a backward pass; None without."""
    architecture, parallel = dictionary.read(case["architecture"]), ParallelConfig(**case["layout"])
    torch.manual_seed(0)
    try:
        world(parallel.processes)
        process_groups.initialize(parallel, 1)
        chunks = gpt.build(architecture, parallel, dtype=torch.float32, perform_initialization=True)
        ids = with_blank(torch.randint(0, 60, (2, case["length"] + 1)), architecture)
        positions = torch.arange(case["length"])[None].expand(2, -1)
        if parallel.virtual_pipeline > 1 and case["micro_batches"] % parallel.pipeline:
            get_forward_backward_func()(
                forward_step_func=None,
                data_iterator=[None] * len(chunks),
                model=chunks,
                num_microbatches=case["micro_batches"],
                seq_length=case["length"],
                micro_batch_size=1,
            )
        if parallel.pipeline == 1:
            chunks[0](ids[:, :-1], positions, None, labels=ids[:, 1:]).sum().backward()
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(directory: Path) -> None:
    ParallelConfig.check_model = lambda self, architecture: None
    real_group = torch.distributed.new_group

    def new_group(*args, backend=None, **kwargs):
        return real_group(*args, **kwargs)  # `fake` where Megatron-Core asks for gloo

    torch.distributed.new_group = new_group
    cases = json.loads((directory / "cases.json").read_text())
    (directory / "results.json").write_text(json.dumps({name: attempt(case) for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
