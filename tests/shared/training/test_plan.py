"""The plan of a run: its estimate of memory."""

from dataclasses import replace

import pytest

from shared.parallel import ParallelConfig
from shared.training.plan import memory_estimate

FOUR = ParallelConfig(processes=4, pipeline=4)


@pytest.mark.parametrize("recompute", [("none",), ("full",)])
def test_the_memory_of_uneven_stages_is_that_of_the_fullest(make_config, architecture, recompute):
    model = replace(architecture, layers=architecture.layers[:1] * 8)

    def estimate(*layers: int) -> int:
        parallel = replace(FOUR, pipeline_layers=layers or None)
        return memory_estimate(make_config(parallel=parallel, recompute=recompute), model)

    assert estimate() == estimate(2, 2, 2, 2)
    # The first stage has the most micro batches in flight: a layer less there is memory gained.
    assert estimate(3, 2, 2, 1) > estimate(1, 3, 2, 2) > estimate() == estimate(2, 2, 1, 3) > estimate(1, 2, 2, 3)
