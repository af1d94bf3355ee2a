"""Models and weights for the tests of this folder."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

warnings.filterwarnings("ignore", message=".*Apex.*")

from shared.architecture.architecture import Architecture  # noqa: E402
from shared.model import weights  # noqa: E402
from shared.model.gpt import build  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime.process_groups import initialize  # noqa: E402
from tests.workers import results_of  # noqa: E402

ONE = ParallelConfig()


@pytest.fixture(scope="session")
def worker():
    """The module `layouts_worker.py`."""
    specification = importlib.util.spec_from_file_location(
        "layouts_worker", Path(__file__).with_name("layouts_worker.py")
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def model_of():
    """A function from an architecture to a single-process model with random weights, in evaluation mode."""

    def make(architecture: Architecture, dtype: torch.dtype = torch.float32, **overrides):
        initialize(ONE, 1)
        return build(architecture, ONE, dtype=dtype, perform_initialization=True, **overrides)[0].eval()

    return make


@pytest.fixture(scope="session")
def saved(worker, tmp_path_factory):
    """A directory with iterations of random weights: `weights`, `one_group` of one key/value head, `delta_net`."""
    directory = tmp_path_factory.mktemp("layouts")
    for name, architecture in {
        "weights": worker.architecture(),
        "one_group": worker.architecture(attention={"groups": 1}),
        "delta_net": worker.delta_net(),
    }.items():
        initialize(ONE, 1)
        chunks = build(architecture, ONE, dtype=torch.float32, perform_initialization=True)
        with torch.no_grad():
            for parameter in chunks[0].parameters():  # biases and norms differ from zero and one
                parameter.add_(torch.randn(parameter.shape) * 0.02)
            weights._clear_padding(chunks[0])
        (directory / name).mkdir()
        worker.save(chunks, directory / name)
    return directory


@pytest.fixture(scope="session")
def two_processes(saved):
    """What `layouts_worker.py` found out in a world of two processes; one spawn serves all tests."""
    return results_of(Path(__file__).with_name("layouts_worker.py"), saved)
