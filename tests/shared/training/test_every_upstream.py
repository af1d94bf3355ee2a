"""Internals of Megatron-Core that shared/training relies on: docs/upstream.md."""

from __future__ import annotations

import queue

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import _validate_sharding_for_key
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer import DistributedOptimizer, _get_param_groups, get_standard_config_overrides
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from shared.training.state import CONTENT
from tests.upstream import attributes_set, binds, calls, relies_on

OPTIMIZER = "shared/training/optimizer.py"
STATE = "shared/training/state.py"
SHARDS = "shared/training/optimizer_shards.py"


def test_the_writers_queue_is_the_modules(monkeypatch) -> None:
    own = queue.Queue()
    monkeypatch.setattr(filesystem_async, "_results_queue", own)
    assert filesystem_async.get_write_results_queue() is own, STATE
    relies_on(
        STATE,
        filesystem_async.FileSystemWriterAsync.prepare_write_data,
        "self.results_queue = get_write_results_queue()",
    )
    assert not torch_strategy.HAVE_NVRX, f"nvidia-resiliency-ext has a queue of its own: re-read {STATE}"


def test_a_request_is_a_function_of_rank_buckets_and_queue() -> None:
    writer, ours = filesystem_async.FileSystemWriterAsync, "shared/training/background_writer.py"
    relies_on(
        ours,
        writer.get_save_function_and_args,
        "[torch.distributed.get_rank(), self.write_buckets, self.results_queue]",
        "(None, None, [])",
        "partial(self.preload_tensors, self.write_buckets, True)",
    )
    relies_on(ours, writer.write_preloaded_data_multithread, "global_results_queue.put(write_results_or_exc)")
    relies_on(ours, writer.retrieve_write_results, "self.results_queue.get_nowait()")
    relies_on(ours, AsyncRequest.execute_sync, "async_fn_args[1] = self.preload_fn()", "finalize_fn()")
    relies_on(ours, dist_checkpointing.save, "async_request.finalize_fns.append(metadata_finalize_fn)")


def test_views_of_larger_storages_are_cloned() -> None:
    relies_on(
        SHARDS,
        filesystem_async.FileSystemWriterAsync.prepare_write_data,
        "is_view = ten.untyped_storage().size() != ten.numel() * ten.itemsize",
    )


def test_a_rank_knows_its_range_of_each_weight() -> None:
    relies_on(
        SHARDS,
        DistributedOptimizer.get_parameter_state_dp_zero,
        "enumerate(self.gbuf_ranges)",
        "gbuf_range_map['param_map'].items()",
        "self._get_main_param_and_optimizer_states(model_param)",
    )
    relies_on(
        SHARDS,
        DistributedOptimizer.sharded_param_state_fully_reshardable,
        "f'{prefix}.{state_key}.{sharded_metadata.key}'",
        "prefix = 'optimizer.state'",
        "param_to_sharded_metadata[sh_base.data] = sh_base",
    )
    relies_on(SHARDS, _validate_sharding_for_key, "not has_regular_sharding_grid")


def test_optimizer_state_is_made_by_an_update() -> None:
    body = DistributedOptimizer._init_optimizer_states_with_dummy_values
    binds(OPTIMIZER, body, None)
    relies_on(
        OPTIMIZER, body, "param.grad = torch.zeros_like(param)", "self.optimizer.step()", "self.optimizer.zero_grad()"
    )


def test_parameter_state_is_loaded_by_number() -> None:
    body = DistributedOptimizer.load_parameter_state_from_fully_reshardable
    binds(OPTIMIZER, body, None, {})
    relies_on(
        OPTIMIZER,
        body,
        "state_dict[param_idx].items()",
        "k == 'step'",
        "src_tensors[k] = v_flat",
        "self._set_main_param_and_optimizer_states(model_param, src_tensors)",
    )
    relies_on(OPTIMIZER, DistributedOptimizer.load_state_dict, "'param_state' in state_dict")


def test_gathered_weights_are_waited_for_by_the_module_called() -> None:
    relies_on(OPTIMIZER, DistributedDataParallel.__init__, "self.param_to_bucket_group[param] = bucket_group")
    relies_on(
        OPTIMIZER, DistributedDataParallel._make_forward_pre_hook, "module.parameters(recurse=False)", "return hook"
    )
    waits = _ParamAndGradBucketGroup.finish_param_sync
    binds(OPTIMIZER, waits, None)
    # A second call of an update waits for nothing.
    relies_on(OPTIMIZER, waits, "not self.param_gather_dispatched", "self.param_gather_handle = None")
    # `gather_weights` leaves nothing to wait for, until the next update's gradients are reduced.
    relies_on(OPTIMIZER, _ParamAndGradBucketGroup.start_param_sync, "self.param_gather_dispatched = True")
    relies_on(OPTIMIZER, _ParamAndGradBucketGroup.finish_grad_sync, "self.param_gather_dispatched = False")


def test_a_load_has_no_room_for_the_padding_between_buckets() -> None:
    joins = DistributedOptimizer.get_parameter_state_dp_zero
    relies_on(
        OPTIMIZER,
        joins,
        "torch.zeros((buffer_numel_unpadded,), dtype=torch.float32, device='cpu')",
    )
    relies_on(
        OPTIMIZER,
        DistributedOptimizer.sharded_param_state_fully_reshardable,
        "state_ten = world_tensors[state_key][param_world_start:param_world_end]",
        "world_tensors = dp_zero_state_dict[gbuf_idx][dtype]",
    )
    calls(
        OPTIMIZER,
        DistributedOptimizer.sharded_param_state_fully_reshardable,
        "self.get_parameter_state_dp_zero",
        empty_data="is_loading",
    )


def test_groups_carry_the_step() -> None:
    relies_on(
        OPTIMIZER,
        DistributedOptimizer.state_dict,
        "state_dict['optimizer'] = {k: v for k, v in inner_state_dict.items() if k != 'state'}",
        "del param_group['params']",
        "param_group['step'] = step",
    )
    # Replaced: one step tensor for all parameters, and room for all moments on the GPU.
    relies_on(OPTIMIZER, DistributedOptimizer.load_state_dict, "s['step'] = step")
    relies_on(OPTIMIZER, DistributedOptimizer.sharded_state_dict, "self.load_state_dict(self.state_dict())")


def test_groups_have_a_factor_of_weight_decay() -> None:
    relies_on(OPTIMIZER, _get_param_groups, "'wd_mult'")
    relies_on(OPTIMIZER, get_standard_config_overrides, "ParamGroupOverride(wd_mult=0.0)")
    relies_on(
        OPTIMIZER,
        OptimizerParamScheduler.step,
        "param_group['weight_decay'] = self.get_wd(param_group) * param_group.get('wd_mult', 1.0)",
    )


def test_a_frozen_routers_bias_stays() -> None:
    relies_on(
        "shared/training/trainable.py",
        _update_router_expert_bias,
        "not getattr(module, 'frozen_expert_bias', False)",
    )


def test_several_optimizers_are_described_by_number() -> None:
    assert "chained_optimizers" in attributes_set(ChainedOptimizer.__init__), OPTIMIZER
    relies_on(
        OPTIMIZER,
        ChainedOptimizer.sharded_state_dict,
        "len(self.chained_optimizers) == 1",
        "sharded_state_dict[optimizer_idx] = optim_state_dict",
        "should_add_prefix = 'distrib_optim_sharding_type' in metadata and metadata['distrib_optim_sharding_type'] "
        "not in DistributedOptimizer.checkpoint_fully_reshardable_formats "
        "or not metadata.get('chained_optim_avoid_prefix', False)",
    )
    binds(OPTIMIZER, DistributedOptimizer.sharded_state_dict, None, {}, False, metadata={})
    relies_on(
        OPTIMIZER,
        DistributedOptimizer.sharded_state_dict,
        "state_dict['param_state'] = param_state",
        "state_dict['param_state_sharding_type'] = sharding_type",
    )
    assert CONTENT["distrib_optim_sharding_type"] in DistributedOptimizer.checkpoint_fully_reshardable_formats


def test_a_checkpoint_is_laid_out_by_these_keys() -> None:
    body = TransformerBlock.sharded_state_dict
    relies_on(
        STATE,
        body,
        "(metadata or {}).get('singleton_local_shards', False)",
        "metadata is not None and metadata.get('non_homogeneous_layers', False)",
    )


def test_a_function_is_compiled_at_first_use() -> None:
    ours = "shared/runtime/extensions.py"
    binds(ours, random._get_share_storage)
    relies_on(ours, random._get_share_storage, "global _share_storage_ext", "return _share_storage_ext.share_storage")
    relies_on(ours, FileBaton.wait, "os.path.exists(self.lock_file_path)")
    relies_on(ours, cpp_extension._get_build_directory, "os.environ.get('TORCH_EXTENSIONS_DIR')")


def test_loads_and_saves_take_this_memory() -> None:
    """Parts of all factories are joined after everything is read; a save copies each tensor to the host."""
    rehearse = "shared/training/rehearse.py"
    relies_on(
        rehearse,
        dist_checkpointing.load,
        "load_preprocess(sharded_state_dict)",
        "apply_factory_merges(common_state_dict, sh_ten_factories)",
    )
    relies_on(
        rehearse,
        filesystem_async.FileSystemWriterAsync.preload_tensors,
        'tensor.to("cpu", non_blocking=non_blocking)',
    )
