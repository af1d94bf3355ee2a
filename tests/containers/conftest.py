"""Images built from this tree, and containers with the strictest supported sandbox settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = 1234  # uid and gid of the caller, whom no image knows
LOCKED = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--security-opt", "no-new-privileges", "--network", "none"),
    *("--user", f"{USER}:{USER}"),
)

Done = subprocess.CompletedProcess[str]


def shell(*words: object, code: int | None = 0, **environment: str) -> Done:
    """Run a program; the exit code must be the one expected, if one is."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert code is None or done.returncode == code, (
        f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine with buildx. `make test-containers` installs one where it can."""
    for words in (("docker", "info"), ("docker", "buildx", "version"), (ROOT / "containers" / "base-image.sh",)):
        try:
            done = shell(*words, code=None)
        except FileNotFoundError as error:
            pytest.skip(f"no Docker here: {error}")
        if done.returncode:
            why = shell(ROOT / "containers" / "engine.sh", "--check", code=None).stderr or done.stderr
            pytest.skip(f"no Docker engine: {why.strip()}")


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the SBOM and the provenance of each image that `build` makes."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="session")
def build(engine: None, records: Path) -> Iterator[Callable[..., str]]:
    """Build an image by containers/build.sh; its name and tag. One made from another tree goes with the tests."""
    passing = []

    def run(tool: str, *variant: str, **environment: str) -> str:
        chosen = {"BASES": "local", "RECORDS": str(records)} | environment
        done = shell(ROOT / "containers" / "build.sh", tool, *variant, **chosen)
        image = done.stdout.splitlines()[-1].split()[0]
        if "SOURCE_TREE" in environment:
            passing.append(image)
        return image

    yield run
    for image in passing:
        shell("docker", "image", "rm", "--force", image)


@pytest.fixture(scope="session")
def convert(build: Callable[..., str]) -> str:
    """The convert image."""
    return build("convert")


@pytest.fixture(scope="session")
def images(build: Callable[..., str]) -> None:
    """What the first stages of the demo need, under the tag `latest`."""
    build("convert")
    build("convert", "logits")
    build("pretrain")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory of the caller's, to be mounted at /data."""
    os.chown(tmp_path, USER, USER) if os.getuid() == 0 else pytest.skip("files of another uid are made by root only")
    return tmp_path


Docker = Callable[..., Done]


@pytest.fixture
def docker(work: Path) -> Docker:
    """`docker run IMAGE WORDS` with `work` at /data and nothing else to write on."""

    def run(image: str, *words: object, code: int = 0, options: tuple[str, ...] = ()) -> Done:
        return shell(
            *("docker", "run", "--rm", "--volume", f"{work}:/data", *LOCKED, *options, image, *words), code=code
        )

    return run


@pytest.fixture
def native() -> Callable[..., Done]:
    """A tool in its own environment on this machine."""

    def run(tool: str, *words: object, code: int = 0) -> Done:
        return shell(ROOT / "tools" / tool / ".venv" / "bin" / tool, *words, code=code, HF_HUB_OFFLINE="1")

    return run


@pytest.fixture(scope="session")
def inspect(engine: None) -> Callable[[str], dict[str, Any]]:
    """What the engine says of an image."""
    return lambda image: dict(json.loads(shell("docker", "image", "inspect", image).stdout)[0])


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """Content hash of every file of a published directory, as its manifest has them."""

    def read(directory: Path) -> dict[str, str]:
        files = json.loads((directory / "manifest.json").read_text())["files"]
        return {name: entry["hash"] for name, entry in files.items()}

    return read


# scripts of image builds, which are no package
sys.path[:0] = [str(ROOT / "containers"), str(ROOT / "containers" / "install"), str(ROOT / "containers" / "infer")]
