"""Rules across options, each with the flag that mends it."""

import pytest

from shared.errors import UserError
from shared.training.config import default_micro_batch_size


def test_sizes_follow_from_the_layout(make_config):
    layout = make_config(processes=8, tensor_parallel=2, pipeline_parallel=2, global_batch_size=16)
    assert (layout.data_parallel, layout.micro_batches, layout.tokens_per_step) == (2, 4, 1024)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (dict(processes=3, tensor_parallel=2), "--processes 2"),
        (dict(global_batch_size=7), "--global-batch-size 8"),
        (dict(processes=2, global_batch_size=10), "--global-batch-size 12"),
        (dict(virtual_pipeline=2), "--pipeline-parallel"),
        (
            dict(virtual_pipeline=2, pipeline_parallel=2, processes=2, global_batch_size=6),
            "--global-batch-size",
        ),
        (dict(sequence_parallel=True), "--tensor-parallel"),
        (dict(sequence_parallel=True, tensor_parallel=2, processes=2, sequence_length=63), "--sequence-length"),
        (dict(min_learning_rate=1.0), "--min-learning-rate"),
        (dict(warmup_steps=100), "--warmup-steps"),
        (dict(schedule="wsd", warmup_steps=81), "--decay-steps"),
        (dict(schedule="constant", warmup_steps=101), "--warmup-steps"),
    ],
)
def test_what_does_not_fit_names_the_flag(make_config, changes, flag):
    with pytest.raises(UserError, match=flag):
        make_config(**changes)


@pytest.mark.parametrize(
    ("run", "model", "flag"),
    [
        (dict(tensor_parallel=8, processes=8, micro_batch_size=1), {}, "--tensor-parallel 8"),
        (dict(tensor_parallel=4, processes=4), dict(ffn_hidden_size=90), "ffn_hidden_size"),
        (dict(tensor_parallel=2, processes=2), dict(num_query_groups=1), None),
        (dict(tensor_parallel=4, processes=4), dict(num_attention_heads=12, num_query_groups=3), "key/value heads"),
        (dict(pipeline_parallel=3, processes=3), {}, "--pipeline-parallel 3"),
        (
            dict(pipeline_parallel=2, virtual_pipeline=4, processes=2),
            {},
            "--virtual-pipeline 4",
        ),
        (dict(sequence_length=129), {}, "--sequence-length 128"),
    ],
)
def test_what_does_not_fit_the_model_names_the_flag(make_config, make_architecture, run, model, flag):
    if flag is None:
        make_config(**run).check_architecture(make_architecture(**model))
        return
    with pytest.raises(UserError, match=flag):
        make_config(**run).check_architecture(make_architecture(**model))


def test_default_micro_batch_divides_the_share_and_stays_small():
    assert default_micro_batch_size(64, 1, 512) == 16
    assert default_micro_batch_size(48, 4, 2048) == 4  # of a share of 12, at most 4 fit
    assert default_micro_batch_size(8, 1, 100_000) == 1
