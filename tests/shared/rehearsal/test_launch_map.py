"""Places of ranks against the environments of torchrun and of our Slurm script; groups against Megatron-Core's order."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.parallel_state import RankGenerator

from shared.errors import UserError
from shared.rehearsal.launch_map import Nodes, by_title, crossing, launched, lines, nodes_of

ROOT = Path(__file__).resolve().parents[3]

# What the script calls. `srun` starts the tasks by blocks, as Slurm does by default, in one shell.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#*=}; shift; done
per_node=$SLURM_NTASKS_PER_NODE
[ "$1 $2" = "sh -c" ] || exit 9
script=$3 # shift: the words behind are the task's own
shift 4
for ((task = 0; task < tasks; task++)); do
    export SLURM_PROCID=$task SLURM_LOCALID=$((task % per_node)) SLURM_NODEID=$((task / per_node))
    export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
    set -- "$@"
    (exec() { "$@"; }; eval "$script")
done
"""
TOOL = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $SLURM_NODEID $WORLD_SIZE"
"""
SCONTROL = """#!/usr/bin/env bash
case $2 in hostnames) echo n0 ;; *) echo "NodeName=n0 NodeAddr=10.0.0.1 Port=1" ;; esac
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("pretrain", TOOL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("count", [2, 128])
def test_our_slurm_script_puts_ranks_where_the_map_says(programs, count) -> None:
    done = subprocess.run(
        ["bash", ROOT / "containers" / "slurm" / "stage.sbatch", "pretrain", "train"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_JOB_NUM_NODES": str(count),
            "SLURM_JOB_NODELIST": f"n[0-{count - 1}]",
            "SLURM_JOB_ID": "7",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[3] for row in rows} == {str(8 * count)}
    given = [{"RANK": rank, "LOCAL_RANK": local, "SLURM_NODEID": node} for rank, local, node, _ in rows]
    assert nodes_of(given) == Nodes.filled(8 * count, 8).of
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in given] == [
        (each["RANK"], each["LOCAL_RANK"]) for each in launched(8 * count, 8)
    ]


@pytest.mark.parametrize(("count", "per_node"), [(2, 8), (16, 4), (128, 8)])
def test_torchrun_puts_ranks_where_the_map_says(count, per_node) -> None:
    """By the agent's own method, which gives each node's workers their ranks."""
    from torch.distributed import HashStore
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent, WorkerSpec

    store = HashStore()
    spec = WorkerSpec(role="default", local_world_size=per_node, rdzv_handler=SimpleNamespace(), entrypoint="x")

    def assigned(node: int) -> list[dict[str, str]]:
        workers = SimpleElasticAgent._assign_worker_ranks(SimpleNamespace(), store, node, count, spec)
        return [
            {"RANK": str(each.global_rank), "LOCAL_RANK": str(each.local_rank), "GROUP_RANK": str(node)}
            for each in workers
        ]

    with ThreadPoolExecutor(count) as nodes:  # each waits for the others
        found = [each for of_node in nodes.map(assigned, range(count)) for each in of_node]
    assert nodes_of(found) == Nodes.filled(count * per_node, per_node).of


def test_groups_that_cross_nodes_are_said() -> None:
    """16 ranks on two nodes: TP 4 stays within them, DP 2 and PP 2 do not."""
    order = RankGenerator(tp=4, ep=1, dp=2, pp=2, cp=1, order="tp-cp-ep-dp-pp")
    names = {
        "tp": "TENSOR_MODEL_PARALLEL_GROUP",
        "dp": "DATA_PARALLEL_GROUP_WITH_CP",
        "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    }
    groups = [(names[token], tuple(ranks)) for token in names for ranks in order.get_ranks(token)]
    groups.append(("EXPERT_MODEL_PARALLEL_GROUP", (0,)))  # of one rank: none
    nodes = Nodes.filled(16, 8)
    assert list(by_title(groups)) == ["TP", "DP", "PP"]
    groups.extend(("EXPERT_TENSOR_PARALLEL_GROUP", group) for group in by_title(groups)["TP"])
    assert lines(groups, nodes, experts=False) == [
        "launch map  16 ranks on 2 nodes",
        "  TP      4 groups of 4    within nodes      ranks 0,1,2,3 on node 0",
        "  DP      8 groups of 2    within nodes      ranks 0,4 on node 0",
        "  PP      8 groups of 2    across nodes      ranks 0,8 on nodes 0,1",
    ]
    assert (
        lines(groups, nodes, experts=True)[2] == "  ETP     4 groups of 4    within nodes      ranks 0,1,2,3 on node 0"
    )
    assert not crossing(groups, nodes, "TP")
    assert crossing(groups, Nodes.filled(16, 2), "TP")
    assert nodes.together((0, 1, 8)) == 1


def test_environments_that_are_no_launch_are_refused() -> None:
    with pytest.raises(UserError, match="start it with torchrun or srun"):
        nodes_of([{"RANK": "0"}])
    with pytest.raises(UserError, match="numbers are not 0 to 0"):
        nodes_of([{"RANK": "1", "GROUP_RANK": "0"}])
