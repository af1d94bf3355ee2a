"""States of tiny models by arithmetic, and a rehearsal of the same ranks. A search for a layout.

Run as `python planner_worker.py DIRECTORY` in an environment of `with_stubs`. Writes `DIRECTORY/results.pkl`.
"""

import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from shared.runtime.silence_warnings import silence

silence()

from shared.rehearsal import fake_world, reexecute  # noqa: E402

if reexecute.playing():
    fake_world.before_forking()

from shared.errors import UserError  # noqa: E402
from shared.families import registry  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.rehearsal.forks import in_forks  # noqa: E402
from shared.rehearsal.launch_map import Nodes  # noqa: E402
from shared.rehearsal.machine import GPUS  # noqa: E402
from shared.rehearsal.speed import SPEEDS  # noqa: E402
from shared.rehearsal.work import Work  # noqa: E402
from shared.training import rehearse  # noqa: E402
from shared.training.choose_layout import Planner  # noqa: E402
from tests.layouts.cases import MODELS  # noqa: E402
from tests.layouts.worker import config  # noqa: E402
from tests.shared.training.rehearsal_worker import LORA  # noqa: E402

GPU = "h100-80"
TIED = MODELS["GQA"].with_values(head={"tied": True})
DEEPSEEK = registry.sizes()["deepseek-v3-tiny"]  # dense and MoE layers, MLA, MTP

# name: (architecture, layout, changes of the configuration)
CASES = {
    "DP 4": (MODELS["GQA"], {"processes": 4}, {}),
    "tied, several buckets": (replace(TIED, vocab_size=1_000_000), {"processes": 8}, {}),
    "fp32": (MODELS["GQA"], {}, {"precision": "fp32"}),
    "tied, PP 2": (TIED, {"processes": 4, "pipeline": 2}, {}),
    "uneven VPP": (
        MODELS["GQA"],
        {"processes": 4, "pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 1, 1, 1)},
        {},
    ),
    "MoE, EP 2, TP 2, ETP 1": (
        MODELS["MoE, correction bias, shared expert"],
        {"processes": 8, "tensor": 2, "sequence_parallel": True, "expert": 4, "expert_tensor": 1},
        {},
    ),
    "MoE, LoRA, EP 2": (MODELS["MoE, aux loss"], {"processes": 2, "expert": 2}, {"lora": LORA}),
    "deepseek, PP 2, EP 2": (DEEPSEEK, {"processes": 4, "pipeline": 2, "expert": 2}, {}),
    "delta net, TP 2": (
        MODELS["gated delta net"],
        {"processes": 2, "tensor": 2, "sequence_parallel": True},
        {},
    ),
}


def planner(case: str) -> tuple[Planner, ParallelConfig]:
    architecture, layout, changes = CASES[case]
    base = replace(config(ParallelConfig()), micro_batch_size=1, global_batch_size=16, precision="bf16")
    base = replace(base, **changes)
    parallel = ParallelConfig(**layout)
    return Planner(
        architecture,
        base,
        gpus=parallel.processes,
        gpu=GPUS[GPU],
        speed=SPEEDS[GPU],
        nodes=Nodes.filled(parallel.processes, 2),
    ), parallel


def compared(case: str) -> dict:
    """By stage: bytes by arithmetic, and those of the rank that was played."""
    found, parallel = planner(case)
    run = found.run(replace(found.base, parallel=parallel))
    held = found.held(parallel)
    work = {
        stage: partial(
            rehearse.play,
            run,
            stage * parallel.processes // parallel.pipeline,
            1 << 40,
            quiet=True,
            names=False,
            work=Work(SPEEDS[GPU]) if case == "DP 4" else None,
        )
        for stage in found.stages(parallel)
    }
    played = in_forks(work, at_once=2, returned=UserError)
    return {stage: (held[stage], played[stage]) for stage in work}


def main(directory: Path, names: list[str]) -> None:
    found = {case: compared(case) for case in names or CASES}
    (directory / "results.pkl").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
