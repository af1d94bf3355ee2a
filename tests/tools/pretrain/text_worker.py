"""A world of four: likelihoods of text in several layouts, `text_worker.py DIRECTORY`.

Reads `DIRECTORY/model`, `DIRECTORY/moe` and `windows.json`; writes `results.json`: layout -> log-likelihood of each window.
"""

import json
import sys
from pathlib import Path

import torch

from shared.data.text_windows import Window
from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.text_likelihood import window_likelihoods
from tests.tools.pretrain.runs import MODEL, MOE
from tests.workers import forked_world

LAYOUTS = {
    "tensor, pipeline": (MODEL, {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
    "context, data": (MODEL, {"context": 2}),
    "data": (MODEL, {}),
    "expert, tensor": (MOE, {"expert": 2, "tensor": 2, "sequence_parallel": True}),
}


def work(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    windows = [Window(**each) for each in json.loads((directory / "windows.json").read_text())]
    results = {}
    for name, (model, sizes) in LAYOUTS.items():
        layout = ParallelConfig(processes=4, **sizes)
        process_groups.initialize(layout, 1)
        chunks = gpt.build(model, layout, dtype=torch.float32, calculate_per_token_loss=True)
        weights.load(chunks, directory / ("moe" if model.moe else "model") / "release")
        results[name] = window_likelihoods(chunks, windows, length=24, micro_batch_size=2)
    (directory / f"rank-{rank}.json").write_text(json.dumps(results))
    process_groups.destroy()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    assert forked_world(4, work, directory), "a rank failed"
    ranks = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert all(rank == ranks[0] for rank in ranks), "ranks have other results"
    (directory / "results.json").write_text(json.dumps(ranks[0]))
