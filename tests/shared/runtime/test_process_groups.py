import pytest
import torch
from megatron.core import parallel_state

from shared.errors import UserError
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize


def test_a_world_of_another_size_is_the_users_mistake():
    with pytest.raises(UserError, match="--processes 2, but this job has 1; give --processes 1"):
        initialize(ParallelConfig(processes=2, tensor=2), 1)


def test_groups_of_an_equal_layout_stay():
    initialize(ParallelConfig(), 1)
    group = parallel_state.get_tensor_model_parallel_group()
    initialize(ParallelConfig(), 2)
    assert parallel_state.get_tensor_model_parallel_group() is group
    parallel_state.destroy_model_parallel()
    initialize(ParallelConfig(), 2)
    assert parallel_state.get_tensor_model_parallel_group() is not group


def test_the_seed_decides_the_random_numbers():
    def draw(seed):
        initialize(ParallelConfig(), seed)
        return torch.rand(4)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
