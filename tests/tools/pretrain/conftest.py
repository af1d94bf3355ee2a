"""Runs that several tests compare with."""

import signal
from pathlib import Path

import pytest

from tests.tools.pretrain.runs import MODEL, run, write_data
from tests.training_runs import random_model, signalled


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A Megatron directory with random weights and no tokenizer."""
    return random_model(tmp_path_factory.mktemp("source") / "model", MODEL)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def whole(source, data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    target = tmp_path_factory.mktemp("whole") / "run"
    assert run(source, data, target) == 0
    return target


@pytest.fixture(scope="session")
def stopped(source, data, tmp_path_factory) -> Path:
    """The same run, told to stop after update 6 by a signal."""
    target = tmp_path_factory.mktemp("stopped") / "run"
    with signalled(signal.SIGUSR1, after=6):
        assert run(source, data, target) == 75
    return target
