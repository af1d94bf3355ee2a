"""Rules across options, each with the flag to change."""

import pytest

from shared.errors import UserError
from shared.parallel import ParallelConfig
from shared.training.config import default_micro_batch_size


def test_sizes_follow_from_the_layout(make_config):
    config = make_config(parallel=ParallelConfig(processes=8, tensor=2, pipeline=2), global_batch_size=16)
    assert (config.micro_batches, config.tokens_per_step) == (4, 1024)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (dict(global_batch_size=7), "--global-batch-size 8"),
        (dict(min_learning_rate=1.0), "--min-learning-rate"),
        (dict(warmup_steps=100), "--warmup-steps"),
        (dict(schedule="wsd", warmup_steps=81), "--decay-steps"),
        (
            dict(schedule="wsd", warmup_steps=0, decay_steps=101),
            "--decay-steps 101 is longer than the run of --steps 100",
        ),
        (dict(schedule="constant", warmup_steps=101), "--warmup-steps"),
    ],
)
def test_what_does_not_fit_names_the_flag(make_config, changes, flag):
    with pytest.raises(UserError, match=flag):
        make_config(**changes)


def test_what_does_not_fit_the_model_names_the_flag(make_config, architecture):
    with pytest.raises(UserError, match="--sequence-length 128"):
        make_config(sequence_length=129).check_model(architecture)
    with pytest.raises(UserError, match="--tensor-parallel 4"):
        make_config(parallel=ParallelConfig(processes=8, tensor=8)).check_model(architecture)


def test_default_micro_batch_divides_the_share_and_stays_small():
    assert default_micro_batch_size(64, 1, 512) == 16
    assert default_micro_batch_size(48, 4, 2048) == 4  # of a share of 12, at most 4 fit
    assert default_micro_batch_size(8, 1, 100_000) == 1
