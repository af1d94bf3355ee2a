"""Times of communications and of updates against their arithmetic."""

from dataclasses import replace

import pytest

from shared.parallel import ParallelConfig
from shared.rehearsal.collectives import Operation
from shared.rehearsal.launch_map import Nodes
from shared.rehearsal.memory import Phase
from shared.rehearsal.speed import LINK_SHARE, SPEEDS
from shared.rehearsal.work import Counted
from shared.training.rehearsal_report import Played
from shared.training.roofline import Stage, operation_time, stage_time, update_time

H100, NODES = SPEEDS["h100-80"], Nodes.filled(16, 8)
PHASE = "forward and backward of update 2"


def operation(kind: str, members: tuple[int, ...], moved: int, group: str = "TENSOR_MODEL_PARALLEL_GROUP") -> Operation:
    return Operation(kind=kind, group=group, members=members, size=moved, module="", phase=PHASE, moved=moved)


@pytest.mark.parametrize(
    ("kind", "members", "seconds"),
    [
        ("_allgather_base_", (0, 1, 2, 3), 0.75 / 450),
        ("allreduce_", (0, 1, 2, 3), 1.5 / 450),
        ("_allgather_base_", (0, 8), 0.5 / 50),  # one adapter on each side
        ("_allgather_base_", (0, 1, 8, 9), 0.75 / 100),  # two
        ("_allgather_base_", tuple(range(16)), 15 / 16 / 400),  # eight, less than the links within
        ("alltoall_base_", (0, 1, 2, 3), 0.75 / 450),
        ("alltoall_base_", (0, 1, 8, 9), 0.5 / 50),  # a half of the rows leaves the node, by the rank's own adapter
        ("send", (0, 8), 1 / 50),
        ("recv_", (1, 0), 1 / 450),
    ],
)
def test_a_communication_takes_the_time_of_its_links(kind, members, seconds) -> None:
    """Of 1 GB."""
    assert operation_time(operation(kind, members, 10**9), H100, NODES) == pytest.approx(seconds / LINK_SHARE)


def test_an_update_is_paced_by_its_slowest_stage(make_config) -> None:
    """arXiv:2104.04473, section 2.2: (m + (p - 1) / v) micro batches."""
    parallel = ParallelConfig(processes=8, pipeline=4, virtual_pipeline=2)
    config = make_config(parallel=parallel, micro_batch_size=1, global_batch_size=16)
    slow = Stage(compute=2.0, links={"TP": 1.0}, data=5.0, optimizer=0.5)
    update = update_time([replace(slow, compute=1.0), slow], config)
    assert (update.compute, update.links, update.bubble) == (16.0, {"TP": 8.0}, 4.5)
    assert update.data == 2.0  # 3 s of it hide behind a micro batch
    assert update.seconds == 16 + 8 + 4.5 + 2 + 0.5
    assert update_time([slow], replace(config, overlap=False)).data == 5.0


def test_a_stage_is_what_was_counted_and_moved() -> None:
    phases = [Phase(name=PHASE, before=1, peak=2, reserved=3)]
    operations = [
        operation("_allgather_base_", (0, 1), 10**9),
        operation("_reduce_scatter_base_", (0, 8), 10**9, "DATA_PARALLEL_GROUP_WITH_CP"),
        operation("allreduce_", (0, 1), 10**9, "MODEL_PARALLEL_GROUP"),
        replace_phase(operation("_allgather_base_", (0, 1), 10**9), "validation"),
    ]
    played = Played(
        rank=0, phases=phases, kept={}, operations=operations, shapes={}, out_of_memory="", where=("", ""),
        work={PHASE: Counted(seconds=8.0), "optimizer of update 2": Counted(seconds=1.0)},
    )  # fmt: skip
    found = stage_time(played, 4, H100, NODES)
    assert found.compute == 2.0
    assert found.links == {"TP": pytest.approx(0.5 / 450 / LINK_SHARE / 4)}
    assert found.data == pytest.approx(0.5 / 50 / LINK_SHARE)
    assert found.optimizer == pytest.approx(1 + 1 / 450 / LINK_SHARE)


def replace_phase(each: Operation, phase: str) -> Operation:
    return each._replace(phase=phase)
