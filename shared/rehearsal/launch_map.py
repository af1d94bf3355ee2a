"""Which node each rank is on, and which process groups cross nodes. Imports no torch.

Nodes are read from the environment that torchrun or Slurm gives each rank, as `containers/slurm/stage.sbatch` starts them. Groups
are those that Megatron-Core made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared.errors import UserError

Group = tuple[str, tuple[int, ...]]  # torch's description of it, and its ranks

# Megatron-Core's groups that a run communicates in, by their short names.
TITLES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "TP",
    "CONTEXT_PARALLEL_GROUP": "CP",
    "EXPERT_MODEL_PARALLEL_GROUP": "EP",
    "EXPERT_TENSOR_PARALLEL_GROUP": "ETP",
    "DATA_PARALLEL_GROUP_WITH_CP": "DP",
    "EXPERT_DATA_PARALLEL_GROUP": "EDP",
    "PIPELINE_MODEL_PARALLEL_GROUP": "PP",
}
_NODES = ("GROUP_RANK", "SLURM_NODEID")  # of torchrun, of Slurm
EXPERTS = ("EP", "ETP", "EDP")  # groups of experts: Megatron-Core makes them for dense models, too
_SHOWN = 8


def launched(ranks: int, per_node: int) -> list[dict[str, str]]:
    """The environment of each rank as both launchers give it: full nodes, one after another (srun's default, `block`)."""
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "GROUP_RANK": str(rank // per_node)}
        for rank in range(ranks)
    ]


def nodes_of(environments: Iterable[Mapping[str, str]]) -> tuple[int, ...]:
    """The node of each rank, by rank. UserError if they are not the ranks of one launch."""
    found: dict[int, int] = {}
    for each in environments:
        node = next((each[name] for name in _NODES if name in each), None)
        if node is None or "RANK" not in each:
            raise UserError(
                f"a rank's environment has no RANK, or none of {', '.join(_NODES)}; start it with torchrun or srun"
            )
        found[int(each["RANK"])] = int(node)
    if sorted(found) != list(range(len(found))):
        raise UserError(f"{len(found)} ranks were started, and their numbers are not 0 to {len(found) - 1}")
    return tuple(found[rank] for rank in range(len(found)))


@dataclass(frozen=True)
class Nodes:
    """Where the ranks are."""

    of: tuple[int, ...]  # by rank

    @classmethod
    def filled(cls, ranks: int, per_node: int) -> Nodes:
        """Full nodes, as launchers fill them."""
        return cls(nodes_of(launched(ranks, per_node)))

    def together(self, ranks: Sequence[int]) -> int:
        """Ranks of a group on the node that has fewest of it."""
        count: dict[int, int] = defaultdict(int)
        for rank in ranks:
            count[self.of[rank]] += 1
        return min(count.values())

    def crosses(self, ranks: Sequence[int]) -> bool:
        """Whether they are on several nodes."""
        return len({self.of[rank] for rank in ranks}) > 1


def by_title(groups: Iterable[Group]) -> dict[str, list[tuple[int, ...]]]:
    """Groups of several ranks by short name, in the order of `TITLES`."""
    found: dict[str, dict[tuple[int, ...], None]] = {title: {} for title in TITLES.values()}
    for name, ranks in groups:
        if name in TITLES and len(ranks) > 1:
            found[TITLES[name]][ranks] = None
    return {title: list(each) for title, each in found.items() if each}


def lines(groups: Iterable[Group], nodes: Nodes, *, experts: bool) -> list[str]:
    """The map: a line for each kind of group. `experts`: whether the model has some, and uses their groups."""
    kinds = {title: found for title, found in by_title(groups).items() if experts or title not in EXPERTS}
    count = len(set(nodes.of))
    found = []
    for title, members in kinds.items():
        across = [each for each in members if nodes.crosses(each)]
        where = "within nodes" if not across else "across nodes" if len(across) == len(members) else "some across nodes"
        example = across[0] if across else members[0]
        found.append(
            f"  {title:<4}{len(members):>5} group{'s' * (len(members) > 1):<2}of {len(members[0]):<5}{where:<18}"
            f"ranks {_some(example)} on node{'s' * nodes.crosses(example)} {_nodes(example, nodes)}"
        )
    head = f"launch map  {len(nodes.of)} ranks on {count} node{'s' * (count > 1)}"
    return [head, *found]


def crossing(groups: Iterable[Group], nodes: Nodes, title: str) -> bool:
    """Whether a group of this kind crosses nodes."""
    return any(nodes.crosses(each) for each in by_title(groups).get(title, ()))


def _some(ranks: Sequence[int]) -> str:
    if len(ranks) <= _SHOWN:
        return ",".join(map(str, ranks))
    return f"{','.join(map(str, ranks[:3]))},...,{ranks[-1]}"


def _nodes(ranks: Sequence[int], nodes: Nodes) -> str:
    found = list(dict.fromkeys(nodes.of[rank] for rank in ranks))
    return _some(found)
