"""What docs/upstream.md lists of this folder."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import token_dispatcher

from tests.upstream import binds, calls, relies_on

FAKE_WORLD = "shared/rehearsal/fake_world.py"
COLLECTIVES = "shared/rehearsal/collectives.py"


def test_groups_are_made_and_objects_gathered_by_functions_of_a_module() -> None:
    relies_on(FAKE_WORLD, parallel_state.create_group, "torch.distributed.new_group(**kwargs)")
    binds(FAKE_WORLD, dist.new_group, [0], backend="fake")
    binds(FAKE_WORLD, dist.all_gather_object, [None], 0, group=None)


def test_the_fake_backend_answers_at_once() -> None:
    from torch.testing._internal.distributed import fake_pg

    relies_on(
        FAKE_WORLD,
        fake_pg._create_fake_pg,
        "FakeProcessGroup._create_internal(common_opts.group_rank, common_opts.group_size, backend_opts)",
    )
    binds(FAKE_WORLD, dist.init_process_group, "fake", store=fake_pg.FakeStore(), rank=0, world_size=2)


def test_tokens_are_counted_in_a_method() -> None:
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    calls(FAKE_WORLD, dispatcher.dispatch_preprocess, "self.preprocess", "self.routing_map")
    relies_on(
        FAKE_WORLD,
        dispatcher.preprocess,
        "self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk",
        "self.output_splits = num_global_tokens_per_rank[self.tp_rank]",
        "self.output_splits_tp = num_global_tokens_per_rank.sum(axis=1)",
        "self.num_global_tokens_per_local_expert = num_global_tokens_per_local_expert.view(-1, self.num_local_experts)",
    )


def test_collectives_have_these_arguments() -> None:
    """The group is a script object among the first ones; `dst` and `src` come third, sizes of an all-to-all last."""
    for name in ("send", "recv_"):
        names = [each.name for each in getattr(torch.ops.c10d, name).default._schema.arguments]
        assert names[:2] == ["tensors", "process_group"], COLLECTIVES
        assert names[2] in ("dst", "src"), COLLECTIVES
    assert torch.ops.c10d.allreduce_.default._opname == "allreduce_", COLLECTIVES
    names = [each.name for each in torch.ops.c10d.alltoall_base_.default._schema.arguments]
    assert names[:5] == ["output", "input", "process_group", "output_split_sizes", "input_split_sizes"], COLLECTIVES
