"""Tiny random models, and a launcher that imports vLLM once for all `infer` commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tools.infer.tiny_models import tiny_model

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a command."""

    code: int
    stdout: str
    stderr: str


class Launcher:
    """`infer` commands in forks of one warm process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, str(LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=os.environ | {"XDG_STATE_HOME": str(directory), "TERM": "xterm"},  # of `infer chat`
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, *words: object, stdin: str = "") -> tuple[int, Path]:
        """Start a command: its process id, and the path whose .out and .err it writes."""
        self.count += 1
        files = self.directory / f"command-{self.count}"
        files.with_suffix(".in").write_text(stdin, encoding="utf-8")
        names = {"stdin": ".in", "stdout": ".out", "stderr": ".err"}
        request = {"run": [str(word) for word in words]}
        return self.ask(request | {k: str(files.with_suffix(v)) for k, v in names.items()})["pid"], files

    def wait(self, pid: int, files: Path) -> Finished:
        """The end of a started command."""
        code = self.ask({"wait": pid})["code"]
        out, err = (files.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err"))
        return Finished(code=code, stdout=out, stderr=err)

    def __call__(self, *words: object, stdin: str = "") -> Finished:
        """Run a command to its end."""
        return self.wait(*self.start(*words, stdin=stdin))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    started = Launcher(tmp_path_factory.mktemp("launcher"))
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    started.process.wait(timeout=20)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family -> a directory with a tiny random model. LLaMA's tokenizer has a chat template, the others' have none."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str, head_dim: int = 32) -> Path:
        path = root / (family if head_dim == 32 else f"{family}-{head_dim}")
        return path if path.exists() else tiny_model(family, path, head_dim=head_dim)

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[..., str]:
    """(directory, prompt, tokens) -> the greedy completion of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def complete(path: Path, prompt: str | list[dict[str, str]], tokens: int, **further: float) -> str:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mask = torch.ones_like(ids)
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=mask, **further)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return complete
