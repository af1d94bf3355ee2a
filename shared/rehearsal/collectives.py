"""What ranks communicate, and whether it matches: order, kind and size in each group, and a receive for every send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.rehearsal.work import Work

_POINT_TO_POINT = ("send", "recv_")


class Operation(NamedTuple):
    """A communication of a rank."""

    kind: str  # torch's name of it, as allreduce_; send, recv_
    group: str  # torch's description of the process group
    members: tuple[int, ...]  # ranks of the world; of send and recv_ the sender and the receiver
    size: int  # bytes: of the larger of input and output
    module: str  # that is computed
    sent: tuple[int, ...] = ()  # all-to-all: rows to each member
    received: tuple[int, ...] = ()  # rows from each member
    phase: str = ""  # of the run
    moved: int = 0  # bytes: as `size`, of an all-to-all what this rank sends


class Record(TorchDispatchMode):
    """Records the communication of this process. torch hands the mode on to autograd's threads."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.operations: list[Operation] = []
        self.module = lambda: ""  # the one that is computed
        self.phase = ""  # of the run
        self.work: Work | None = None  # counts what else is computed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func, args)
        found = func(*args, **(kwargs or {}))
        if self.work is not None:
            self.work.add(self.phase, func, args, kwargs or {}, found)
        return found

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        found = next((each for each in tree_leaves(args) if isinstance(each, torch.ScriptObject)), None)
        if found is None:
            return
        group = dist.ProcessGroup.unbox(found)
        members = tuple(dist.get_process_group_ranks(group))
        kind = func._opname
        if len(members) == 1:
            return
        size = moved = max((_bytes(part) for part in args[:2]), default=0)
        sent: tuple[int, ...] = ()
        received: tuple[int, ...] = ()
        if kind in _POINT_TO_POINT:
            other = members[args[2]]
            members = (self.rank, other) if kind == "send" else (other, self.rank)
        elif kind == "alltoall_base_":
            output, given, _, of_output, of_input = args[:5]
            received = _rows(output, of_output, len(members))
            sent = _rows(given, of_input, len(members))
            size, moved = 0, given.nbytes  # differs between ranks
        self.operations.append(
            Operation(
                kind=kind, group=group.group_desc, members=members, size=size, module=self.module(), sent=sent,
                received=received, phase=self.phase, moved=moved,
            )
        )  # fmt: skip


def _bytes(part: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(part) if isinstance(each, torch.Tensor))


def _rows(tensor: torch.Tensor, splits: Sequence[int], members: int) -> tuple[int, ...]:
    return tuple(splits) if splits else (len(tensor) // members,) * members


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The result of `match`."""

    operations: int
    groups: int  # and pairs of ranks
    mismatch: str | None  # the first, as a clause; None: all match


def match(recorded: Mapping[int, Sequence[Operation]]) -> Matched:
    """Compare the communication of ranks. A rank that was not played is taken to do its part."""
    collective: dict[tuple[str, tuple[int, ...]], dict[int, list[Operation]]] = defaultdict(lambda: defaultdict(list))
    pairs: dict[tuple[str, tuple[int, ...]], dict[str, list[Operation]]] = defaultdict(lambda: defaultdict(list))
    for rank, operations in recorded.items():
        for each in operations:
            if each.kind in _POINT_TO_POINT:
                pairs[each.group, each.members][each.kind].append(each)
            else:
                collective[each.group, each.members][rank].append(each)
    mismatches = [
        _mismatch_of_group(name, {rank: of_rank.get(rank, []) for rank in members if rank in recorded})
        for (name, members), of_rank in collective.items()
    ] + [
        _mismatch_of_pair(name, members, by_kind)
        for (name, members), by_kind in pairs.items()
        if all(rank in recorded for rank in members)
    ]
    return Matched(
        operations=sum(map(len, recorded.values())),
        groups=len(collective) + len(pairs),
        mismatch=next((each for each in mismatches if each), None),
    )


def _mismatch_of_group(name: str, of_rank: Mapping[int, Sequence[Operation]]) -> str | None:
    first, *others = of_rank
    for other in others:
        for index, (one, two) in enumerate(zip(of_rank[first], of_rank[other], strict=False)):
            if (one.kind, one.size) != (two.kind, two.size) or _splits_differ(one, two, first, other):
                return f"operation {index + 1} of group {name} is {_said(one)} on rank {first} and {_said(two)} on rank {other}"
        counts = len(of_rank[first]), len(of_rank[other])
        if counts[0] != counts[1]:
            longer = first if counts[0] > counts[1] else other
            extra = of_rank[longer][min(counts)]
            return (
                f"group {name}: rank {first} has {counts[0]} operations and rank {other} {counts[1]}; the first without a "
                f"partner is {_said(extra)} on rank {longer}"
            )
    return None


def _splits_differ(one: Operation, two: Operation, first: int, other: int) -> bool:
    """Whether an all-to-all sends another number of rows than is received."""
    if not one.sent:
        return False
    at, to = one.members.index(first), one.members.index(other)
    return one.sent[to] != two.received[at] or two.sent[at] != one.received[to]


def _mismatch_of_pair(name: str, members: tuple[int, ...], by_kind: Mapping[str, Sequence[Operation]]) -> str | None:
    sent, received = by_kind.get("send", ()), by_kind.get("recv_", ())
    sender, receiver = members
    for index, (one, two) in enumerate(zip(sent, received, strict=False)):
        if one.size != two.size:
            return f"message {index + 1} from rank {sender} ({one.size} bytes) to rank {receiver} ({two.size} bytes) in {name}"
    if len(sent) != len(received):
        return f"rank {sender} sends {len(sent)} messages to rank {receiver}, which receives {len(received)} from it, in {name}"
    return None


def _said(each: Operation) -> str:
    within = f" in {each.module}" if each.module else ""
    size = f" of {each.size} bytes" if each.size else f" of {sum(each.sent)} rows"
    return f"{each.kind.strip('_')}{size}{within}"
