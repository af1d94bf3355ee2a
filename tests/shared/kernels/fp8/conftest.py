"""The Triton kernels in the interpreter, once for all tests of this folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.workers import results_of

_FILE = Path(__file__).with_name("triton_worker.py")


@pytest.fixture(scope="session")
def triton_worker():
    """The module `triton_worker.py`."""
    specification = importlib.util.spec_from_file_location("triton_worker", _FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """By case, the fields that differ from torch's in the interpreter; `gradients`: by tensor, by how much."""
    return results_of(_FILE, tmp_path_factory.mktemp("triton"))
