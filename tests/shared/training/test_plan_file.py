"""A plan as a file: what a run takes of it, and what is refused."""

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.training.options import TrainingOptions
from shared.training.plan_file import KIND, check_world, identity, taken

FLAGS = {
    "--tensor-parallel": "2",
    "--sequence-parallel": "",
    "--pipeline-parallel": "2",
    "--pipeline-layers": "3,1",
    "--recompute": "full",
    "--micro-batch-size": "1",
}


def options(**changes) -> TrainingOptions:
    return TrainingOptions(
        **{"source": Path("mg"), "data": (), "target": Path("run"), "global_batch_size": 64, **changes}
    )


@pytest.fixture
def write(tmp_path, architecture):
    def write(**changes) -> Path:
        content = {
            "kind": KIND,
            "version": 1,
            "model": identity(architecture),
            "gpus": 8,
            "sequence_length": 32,
            "global_batch_size": 64,
            "precision": "bf16",
            "lora_rank": None,
            "layouts": [{"flags": FLAGS}, {"flags": {}}],
        }
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    return write


def test_a_run_has_the_first_layout(write, architecture) -> None:
    plan = write()
    found = taken(options(), plan, architecture=architecture, sequence_length=32)
    assert (found.tensor_parallel, found.pipeline_parallel, found.pipeline_layers) == (2, 2, (3, 1))
    assert (found.sequence_parallel, found.recompute, found.micro_batch_size) == (True, ("full",), 1)
    assert found.expert_tensor_parallel is None
    check_world(plan, 8)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({"model": "other"}, {}, "was made for another model, and not for the model of --source"),
        ({"sequence_length": 64}, {}, "was made for --sequence-length 64, and not for --sequence-length 32"),
        ({}, {"global_batch_size": 8}, "was made for --global-batch-size 64, and not for --global-batch-size 8"),
        ({}, {"precision": "fp32"}, "was made for --precision bf16"),
        ({}, {"lora_rank": 8}, "was made for no --lora-rank, and not for --lora-rank 8"),
        ({}, {"tensor_parallel": 4}, "says the layout, and --tensor-parallel says it, too; leave one of them out"),
        ({}, {"recompute": ("full",)}, "--recompute says it, too"),
        ({}, {"world": 16}, "was made for 8 GPUs, and --world is 16"),
        ({"kind": "x"}, {}, "is no plan; make one by `pretrain plan --json FILE`"),
        ({"version": 9}, {}, "has version 9, this tool reads 1"),
        ({"layouts": []}, {}, "has no layout that fits"),
    ],
)
def test_a_plan_of_another_run_is_refused(write, architecture, content, changes, message) -> None:
    with pytest.raises(UserError) as error:
        taken(options(**changes), write(**content), architecture=architecture, sequence_length=32)
    assert message in str(error.value)


def test_other_numbers_of_processes_and_other_files_are_refused(write, architecture, tmp_path) -> None:
    with pytest.raises(UserError, match="made for 8 GPUs, and this run has 4 processes"):
        check_world(write(), 4)
    (tmp_path / "x").write_text("{")
    with pytest.raises(UserError, match="is no JSON file"):
        taken(options(), tmp_path / "x", architecture=architecture, sequence_length=32)
