"""A tiny model and run for the tests of this folder."""

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

from shared.architecture.architecture import MTP, Architecture
from shared.families import registry
from shared.parallel import ParallelConfig
from shared.runtime.silence_warnings import silence
from shared.training.config import TrainingConfig
from tests.workers import results_of

silence()


def tiny_config(**changes) -> TrainingConfig:
    fields = dict(
        steps=100,
        sequence_length=64,
        micro_batch_size=2,
        global_batch_size=8,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        schedule="cosine",
        warmup_steps=10,
        decay_steps=20,
        weight_decay=0.1,
        clip_grad=1.0,
        mtp_loss_scaling_factor=0.1,
        moe_router_bias_update_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        seed=1,
        precision="fp32",
        fp8=None,
        recompute=("none",),
        parallel=ParallelConfig(),
        save_every=10,
        keep=2,
        async_save=False,
        log_every=1,
        validate_every=0,
        validation_sequences=10,
        backend=None,
        attention_backend=None,
        overlap=True,
    )
    return TrainingConfig(**{**fields, **changes})


TINY = registry.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)
TINY_MTP = replace(TINY.with_values(head={"tied": False}), mtp=MTP(depth=2, layer=TINY.layers[0]))


@pytest.fixture
def make_config() -> Callable[..., TrainingConfig]:
    """A function from changed fields to the configuration of a run."""
    return tiny_config


@pytest.fixture
def architecture() -> Architecture:
    """A tiny model's."""
    return TINY


@pytest.fixture(scope="session")
def tiny_run() -> tuple[TrainingConfig, Architecture]:
    """A run of the tiny model, for tests that share its results."""
    return tiny_config(sequence_length=24, micro_batch_size=1), TINY


@pytest.fixture(scope="session")
def mtp_run() -> tuple[TrainingConfig, Architecture]:
    """The same of a model with two MTP layers."""
    return tiny_config(sequence_length=24, micro_batch_size=1), TINY_MTP


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A torch_dist directory with random weights of the tiny model."""
    return random_weights(tmp_path_factory.mktemp("start") / "release", TINY)


@pytest.fixture(scope="session")
def start_mtp(tmp_path_factory) -> Path:
    """The same of a model with two MTP layers."""
    return random_weights(tmp_path_factory.mktemp("mtp") / "release", TINY_MTP)


@pytest.fixture(scope="session")
def make_weights() -> Callable[[Path, Architecture], Path]:
    """A function that writes random weights of an architecture to a new torch_dist directory."""
    return random_weights


@pytest.fixture(scope="session")
def sessions() -> ModuleType:
    """The module `layouts_worker.py`."""
    specification = importlib.util.spec_from_file_location("sessions", Path(__file__).with_name("layouts_worker.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory) -> Callable[..., tuple[Path, dict]]:
    """A function that runs the cases of `cases_worker.py`, or of another worker, and returns the directory and the results."""

    def run(cases: dict[str, dict], worker: str = "cases_worker.py") -> tuple[Path, dict]:
        directory = tmp_path_factory.mktemp("cases")
        for name in cases:
            (directory / name).mkdir()
        (directory / "cases.json").write_text(json.dumps(cases))
        return directory, results_of(Path(__file__).with_name(worker), directory)

    return run


def random_weights(directory: Path, architecture: Architecture) -> Path:
    from megatron.core import dist_checkpointing

    from shared.model import gpt, weights
    from shared.runtime import process_groups
    from shared.training.state import write_from_threads

    directory.mkdir()
    process_groups.initialize(ParallelConfig(), 5)
    chunks = gpt.build(architecture, ParallelConfig(), dtype=_float32(), perform_initialization=True)
    write_from_threads()
    dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(directory))
    return directory


def _float32():
    import torch

    return torch.float32
