"""A run is done at its end only."""

import os
import sys

import pytest

from shared.errors import StageError
from shared.invocation import invoked
from tools.rlhf.engines.deepspeed import USE_DEEPSPEED, initialize_distributed, trainer_config
from tools.rlhf.options import DPOOptions
from tools.rlhf.run_context import open_run, open_training


@pytest.mark.parametrize(("code", "error"), [(0, StageError), (None, StageError), (3, SystemExit)])
def test_an_exit_inside_the_run_is_not_its_end(tmp_path, code, error):
    initialize_distributed()
    target = tmp_path / "out"
    with (
        pytest.raises(error),
        invoked("rlhf", "grpo", {}, version="0", not_fingerprinted=()),
        open_run(target, {}, overwrite=False),
    ):
        sys.exit(code)
    assert not target.exists()


@pytest.mark.parametrize("given", [None, "false"])
def test_accelerate_is_told_of_deepspeed_within_the_run_only(world, tmp_path, monkeypatch, given):
    """Another run of the process may be one without ZeRO."""
    monkeypatch.delenv(USE_DEEPSPEED, raising=False)
    if given is not None:
        monkeypatch.setenv(USE_DEEPSPEED, given)
    options = DPOOptions(source=world.policy, data=world.pairs, target=tmp_path / "out", zero=2)
    with (
        pytest.raises(StageError, match="stopped"),
        invoked("rlhf", "dpo", {}, version="0", not_fingerprinted=()),
        open_training(options, initialize_distributed()),
    ):
        trainer_config(options.zero)
        assert os.environ[USE_DEEPSPEED] == "true"
        raise StageError("stopped")
    assert os.environ.get(USE_DEEPSPEED) == given
