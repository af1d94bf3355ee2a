"""Small published directories, and a command that publishes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shared.checkpoint.directory.publish import publish
from shared.invocation import invoked


@pytest.fixture(autouse=True)
def command() -> Iterator[None]:
    with invoked(
        "convert", "to-hf", {"dtype": "bf16", "workers": 2, "overwrite": False}, not_fingerprinted=("workers",)
    ):
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


@pytest.fixture
def published(tmp_path: Path, source: Path) -> Callable[..., Path]:
    def make(
        name: str = "published",
        *,
        content: bytes = b"0" * 5000,
        overwrite: bool = False,
        others: Sequence[str] = (),
    ) -> Path:
        target = tmp_path / name
        with publish(target, kind="hf", inputs={"source": source}, overwrite=overwrite) as out:
            (out.path / "nested").mkdir()
            (out.path / "nested" / "a.txt").write_text("a")
            (out.path / "model.safetensors").write_bytes(content)
            for other in others:
                (out.path / other).parent.mkdir(exist_ok=True)
                (out.path / other).write_text(other)
            out.describe(family="llama", tensors=3)
        return target

    return make
