"""The user's reward functions: whatever they do, the run ends with one line and never as if it were done."""

import pytest

from shared.errors import UserError
from tools.rlhf.rewards.python_function import FunctionReward


@pytest.mark.parametrize("body", ["import sys\nsys.exit(0)", "raise SystemExit", "1 / 0", "import no_such_module", "def"])
def test_a_file_that_does_not_load_is_named(tmp_path, body):
    file = tmp_path / "reward.py"
    file.write_text(body)
    with pytest.raises(UserError, match=r"reward.py:f: the file does not load: "):
        FunctionReward(file, "f")
