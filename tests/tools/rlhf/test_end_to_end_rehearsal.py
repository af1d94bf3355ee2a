"""DeepSpeed's engines on a GPU that is not there: their own CUDA path, in the CUDA runtime of stubs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.rehearsal.machine import GPUS
from shared.rehearsal.reexecute import with_stubs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def played(world, tmp_path_factory) -> dict:
    """What `rehearsal_worker.py` found."""
    file = tmp_path_factory.mktemp("played") / "found.json"
    job = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    environment = {name: value for name, value in os.environ.items() if name not in job}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("rehearsal_worker.py"), world.policy, file],
        env=with_stubs({**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, GPUS["h100-80"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("zero", ["0", "1", "2", "3"])
def test_an_update_is_made_on_the_gpu(played, zero) -> None:
    """Nothing falls back to the host. The model is in bf16, AdamW in fp32, attention in a fused kernel."""
    computed = played[zero]["computed"]
    dtypes = {name: {dtype for of, _, dtype in computed if of == name} for name, *_ in computed}
    assert {device for _, device, _ in computed} == {"cuda"}
    assert dtypes["mm"] == dtypes["embedding"] == {"bfloat16"}
    assert dtypes["_fused_adamw_"] == {"float32"}
    assert any("flash_attention" in name or "efficient_attention" in name for name in dtypes), dtypes
    assert played[zero]["parameters"] == [["cuda", "torch.bfloat16"]]
