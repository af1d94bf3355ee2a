"""Every size of every family in many layouts: accepted, or refused in one line with correct advice.

tests/shared/model/test_every_layout.py compares acceptance with Megatron-Core.
"""

import re
from dataclasses import replace

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.parallel import ParallelConfig

LAYOUTS = [
    ParallelConfig(processes=2),
    *(ParallelConfig(processes=tensor, tensor=tensor) for tensor in (2, 3, 4, 5, 8, 16)),
    *(ParallelConfig(processes=tensor, tensor=tensor, sequence_parallel=True) for tensor in (2, 3, 4, 8, 16)),
    *(ParallelConfig(processes=stages, pipeline=stages) for stages in (2, 3, 4, 8)),
    *(ParallelConfig(processes=2, pipeline=2, virtual_pipeline=chunks) for chunks in (2, 3, 8)),
    *(ParallelConfig(processes=experts, expert=experts) for experts in (2, 3, 4, 8, 64)),
    ParallelConfig(processes=8, tensor=4, sequence_parallel=True, expert=8, expert_tensor=1),
    ParallelConfig(processes=8, tensor=2, sequence_parallel=True, pipeline=2, virtual_pipeline=2, expert=2),
]
COMPLAINT = r"--[a-z-]+ \d+( x --[a-z-]+ \d+)? |(MoE|MLA|a gated delta net) with --tensor-parallel \d+ "
FIELDS = {
    "--tensor-parallel": "tensor",
    "--pipeline-parallel": "pipeline",
    "--virtual-pipeline": "virtual_pipeline",
    "--expert-parallel": "expert",
    "--expert-tensor-parallel": "expert_tensor",
}


def followed(parallel: ParallelConfig, advice: str) -> ParallelConfig:
    """The layout with what "give ..." says, in a world that is large enough; not its other way, `--pipeline-layers`."""
    advice = advice.partition(", or --pipeline-layers")[0]
    changes = {FIELDS[flag]: int(size) for flag, size in re.findall(r"(--[a-z-]+) (\d+)", advice)}
    if "--sequence-parallel" in advice:
        changes["sequence_parallel"] = "without --sequence-parallel" not in advice
    world = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert} | changes
    processes = 64 * world["tensor"] * world["pipeline"] * world["expert"]
    return replace(parallel, **{**changes, "processes": processes})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_is_accepted_or_refused_with_good_advice(layout):
    """Of each kind of complaint there is one at most: whoever follows what is said arrives in a few steps."""
    for size, architecture in registry.sizes().items():
        parallel, said = layout, []
        while True:
            try:
                parallel.check_model(architecture)
                break
            except UserError as error:
                (text,) = error.args
            assert "\n" not in text
            complaint, advice = text.rsplit("; give ", 1)
            assert re.match(COMPLAINT, complaint), text
            said.append(text)
            assert len(said) <= 4, (size, said)
            parallel = followed(parallel, advice)


def test_some_are_accepted_and_some_refused():
    """So that rules which say yes, or no, to all would show."""
    verdicts = {}
    for layout in LAYOUTS:
        for size, architecture in registry.sizes().items():
            try:
                layout.check_model(architecture)
                verdicts[layout, size] = True
            except UserError:
                verdicts[layout, size] = False
    assert sum(verdicts.values()) > 1500
    assert len(verdicts) - sum(verdicts.values()) > 1500
    always = {size for layout, size in verdicts if all(verdicts[each, size] for each in LAYOUTS[:1])}
    assert always == set(registry.sizes())  # data parallelism is for all


@pytest.mark.parametrize("size", [size for size in registry.sizes() if size.endswith("-tiny")])
def test_layouts_that_every_family_is_trained_in(size):
    """Those of tests/tools/convert/family_worker.py."""
    architecture = registry.sizes()[size]
    ParallelConfig(processes=2, tensor=2, sequence_parallel=True).check_model(architecture)
    ParallelConfig(processes=2, pipeline=2).check_model(architecture)
    if architecture.moe:
        ParallelConfig(processes=2, expert=2).check_model(architecture)
