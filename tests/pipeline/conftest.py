"""The installed tools: console scripts in their own environments, connected by directories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Baton = Callable[..., subprocess.CompletedProcess[str]]


def command(tool: str, *words: object) -> list[str]:
    """A tool's command line, as the demo prints it."""
    return [str(ROOT / "tools" / tool / ".venv" / "bin" / tool), *map(str, words)]


@pytest.fixture(scope="session")
def baton() -> Baton:
    """Run a tool; the exit code must be the one expected."""

    def run(tool: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command(tool, *words), capture_output=True, text=True, check=False, env=environment, cwd=ROOT
        )
        assert done.returncode == code, f"{tool} {words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[bytes]]:
    """Start a tool and let it run."""

    def run(tool: str, *words: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command(tool, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, baton: Baton) -> Path:
    """A random Hugging Face model of a few megabytes, and its Megatron form: `hf/`, `mg/`."""
    place = tmp_path_factory.mktemp("model")
    baton("convert", "init", "--size", "llama-5m", "--target", place / "hf")
    baton("convert", "to-megatron", "--source", place / "hf", "--target", place / "mg")
    return place
