"""What docs/upstream.md lists of this folder."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import token_dispatcher

from tests.upstream import binds, calls, relies_on

LAUNCH_MAP, WORK = "shared/rehearsal/launch_map.py", "shared/rehearsal/work.py"
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


def test_groups_have_these_descriptions() -> None:
    from shared.rehearsal.launch_map import TITLES

    for name in TITLES:
        relies_on(LAUNCH_MAP, parallel_state.initialize_model_parallel, f"{name!r}")


def test_flops_are_counted_by_these_formulas() -> None:
    """Of products of the run, and one that torch has no formula for."""
    from torch.utils.flop_counter import flop_registry

    from shared.rehearsal.work import flops_of

    aten = torch.ops.aten
    one, two = torch.empty(3, 5), torch.empty(5, 7)
    assert flops_of(aten.mm.default, (one, two), {}, one @ two) == 2 * 3 * 5 * 7, WORK
    assert flops_of(aten.add.Tensor, (one, one), {}, one) == 0, WORK
    assert aten._scaled_dot_product_flash_attention in flop_registry, WORK
    assert aten._grouped_mm not in flop_registry, f"torch counts grouped products now: re-read {WORK}"
    groups = torch.empty(2, 5, 7)
    assert flops_of(aten._grouped_mm.default, (one, groups), {}, None) == 2 * 3 * 5 * 7, WORK
    assert (aten.view.default.is_view, aten.mm.default.is_view) == (True, False), WORK
