import pytest
import torch

from shared.architecture.flat_view import changed as replace
from shared.errors import UserError
from shared.families import registry
from shared.runtime.process_groups import ParallelLayout, initialize


@pytest.mark.parametrize(
    ("fields", "world", "words"),
    [
        ({"tensor": 2}, 3, "--processes 3 is not a multiple of --tensor-parallel 2"),
        ({"tensor": 8}, 8, "--tensor-parallel 8 does not divide the model's 4 attention heads"),
        ({"pipeline": 3}, 3, "--pipeline-parallel 3 does not divide the model's 4 layers"),
        ({"pipeline": 2, "virtual_pipeline": 4}, 2, "x --virtual-pipeline 4 does not divide"),
        ({"virtual_pipeline": 2}, 1, "--virtual-pipeline above 1 needs --pipeline-parallel"),
        ({"sequence_parallel": True}, 1, "--sequence-parallel needs --tensor-parallel"),
        ({"tensor": 0}, 1, "--tensor-parallel must be at least 1"),
        ({"context": 2}, 2, "--context-parallel 2: only 1"),
        ({"expert": 2}, 2, "--expert-parallel 2"),
    ],
)
def test_what_does_not_fit_names_the_flag(worker, fields, world, words):
    with pytest.raises(UserError, match=words):
        ParallelLayout(**fields).check(worker.architecture(), world)


def test_key_value_heads_that_cannot_be_cut(worker):
    architecture = worker.architecture(num_attention_heads=12, num_query_groups=3, head_dim=8)
    with pytest.raises(UserError, match="--tensor-parallel 4 neither divides nor is a multiple of the model's 3"):
        ParallelLayout(tensor=4).check(architecture, 4)
    ParallelLayout(tensor=6).check(architecture, 6)


def test_latent_attention_that_cannot_be_cut():
    architecture = registry.sizes()["deepseek-v3-tiny"]
    with pytest.raises(UserError, match="latent attention with --tensor-parallel above 1 needs --sequence-parallel"):
        ParallelLayout(tensor=2).check(architecture, 2)
    uneven = replace(architecture, latent=replace(architecture.latent, q_lora_rank=21))
    with pytest.raises(
        UserError, match="--tensor-parallel 2 does not divide latent attention's low-rank projection of 21"
    ):
        ParallelLayout(tensor=2, sequence_parallel=True).check(uneven, 2)


def test_delta_nets_that_cannot_be_cut():
    architecture = registry.sizes()["qwen3-next-tiny"]
    with pytest.raises(UserError, match="gated delta nets with --tensor-parallel above 1 need --sequence-parallel"):
        ParallelLayout(tensor=2).check(architecture, 2)
    with pytest.raises(UserError, match="does not divide the gated delta nets' 2 heads of keys"):
        ParallelLayout(tensor=4, sequence_parallel=True).check(architecture, 4)


def test_a_world_too_small_is_the_users_mistake():
    with pytest.raises(UserError, match="1 processes cannot hold a model cut over 2"):
        initialize(ParallelLayout(tensor=2), 1)


def test_the_seed_decides_the_random_numbers():
    def draw(seed):
        initialize(ParallelLayout(), seed)
        return torch.rand(4)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
