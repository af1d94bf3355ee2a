"""`rlhf ppo` on a GPU that is not there: DeepSpeed, transformers and our loop on the CUDA runtime of stubs."""

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
    """One iteration of two updates, in bf16, to its published policy."""
    directory = tmp_path_factory.mktemp("played")
    flags = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("red"), "target": directory / "ppo",
        "steps": 1, "max_new_tokens": 4, "micro_batch_size": 8, "rollout_batch_size": 16, "global_batch_size": 8,
        "epochs": 1,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    job = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    environment = {name: value for name, value in os.environ.items() if name not in job}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("rehearsal_worker.py"), directory / "found.json", "1", "ppo", *words],
        env=with_stubs({**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, GPUS["h100-80"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (directory / "found.json").exists(), done.stderr
    found = json.loads((directory / "found.json").read_text())
    return found | {"log": done.stderr, "target": directory / "ppo"}


def test_an_iteration_runs_to_its_published_policy(played) -> None:
    assert played["code"] == 0, played["log"]
    assert "1 process(es) on cuda, ZeRO stage 0, bf16" in played["log"]
    assert (played["target"] / "model.safetensors").exists()


def test_nothing_is_computed_on_the_host(played) -> None:
    """Products, attention and lookups of policy, critic and reference, and AdamW, are on the GPU; AdamW in fp32, the models in bf16."""
    names, devices, _ = zip(*played["computed"], strict=True)
    assert {"mm", "embedding", "_fused_adamw_"} <= set(names)
    assert any("attention" in name for name in names)
    assert set(devices) == {"cuda"}
    dtypes = {name: {dtype for of, _, dtype in played["computed"] if of == name} for name in names}
    assert dtypes["_fused_adamw_"] == {"float32"}
    assert dtypes["mm"] == {"bfloat16"}
