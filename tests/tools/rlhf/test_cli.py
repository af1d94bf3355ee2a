"""What the command decides before any library is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_is_asked_or_told_over_the_network() -> None:
    """In a process whose user has set nothing: TRL reports its use unless huggingface_hub is told before it is imported."""
    read = "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HUB_DISABLE_TELEMETRY)"
    code = f"import tools.rlhf.cli; {read}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]
