"""A run is done at its end only."""

import sys

import pytest

from shared.errors import StageError
from shared.invocation import invoked
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.run_context import open_run


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
