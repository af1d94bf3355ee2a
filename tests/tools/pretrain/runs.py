"""Tiny runs of `pretrain train`: model, data, command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

os.environ["OMP_NUM_THREADS"] = "1"

from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.data.indexed import IndexedWriter
from shared.families import registry
from shared.runtime.silence_warnings import silence
from tests import training_runs
from tools.pretrain.cli import tool

silence()

REPOSITORY = Path(__file__).parents[3]
VOCAB = 300
TRAIN_TOKENS = 6000
MODEL = registry.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
)
MOE = registry.sizes()["mixtral-tiny"]
OPTIONS = {
    "steps": 12,
    "sequence_length": 32,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "save_every": 4,
    "validate_every": 6,
}


def write_data(
    target: Path, vocab_size: int = VOCAB, data_format: str = "indexed", train_tokens: int = TRAIN_TOKENS
) -> Path:
    """Documents that count upwards: the next token can be learned."""
    rng = np.random.default_rng(1)
    with invoked("pretrain", "prepare", {}), publish(target, kind="dataset", inputs={}) as out:
        splits = {}
        for split, tokens in (("train", train_tokens), ("validation", 700)):
            lengths = [100] * (tokens // 100)
            starts = rng.integers(0, 40, len(lengths))
            documents = [(start + np.arange(100)) % 40 for start in starts]
            writer = IndexedWriter(out.path / split, np.dtype(np.uint16))
            writer.add(np.concatenate(documents), lengths)
            writer.close()
            splits[split] = {"tokens": tokens, "documents": len(lengths), "utf8_bytes": 3 * tokens}
        (out.path / "tokenizer").mkdir()
        (out.path / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        out.describe(format=data_format, splits=splits, vocab_size=vocab_size, eos_token_id=0, dtype="uint16")
    return target


def words(source: Path, data: Path | str, target: Path, **options) -> list[str]:
    """The command line."""
    return training_runs.words("train", **{"source": source, "data": data, "target": target, **OPTIONS, **options})


def run(source: Path, data: Path | str, target: Path, **options) -> int:
    """The command in this process; its exit code."""
    return training_runs.exit_code(tool, words(source, data, target, **options))


_KILLED = """
import os, signal, sys
from shared.training.recorder import Recorder
plain = Recorder.updated
def updated(self, step, *numbers):
    plain(self, step, *numbers)
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.updated = updated
from tools.pretrain.cli import tool
tool.run(sys.argv[2:])
"""


def killed(line: list[str], *, after: int) -> None:
    """The command in a process that gets SIGKILL right after an update, which is recorded."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(after), *line],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def launched(script: str, folder: Path, *line: object) -> subprocess.CompletedProcess[str]:
    """A program in FOLDER that changes something and calls the tool with `line`: the launcher starts it again in each rank."""
    program = folder / "train.py"
    program.write_text(script)
    return subprocess.run(
        [sys.executable, program, *line],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
