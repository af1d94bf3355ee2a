"""Tiny runs of `pretrain train`: model, data, command line, results."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.data.indexed import IndexedWriter
from shared.families import registry
from shared.runtime.silence_warnings import silence
from tools.pretrain.cli import tool

silence()

REPOSITORY = Path(__file__).parents[3]
TIMING = {"seconds", "tokens_per_second", "memory_bytes"}
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


def random_model(directory: Path, model: Architecture, change=lambda chunk: None) -> Path:
    from megatron.core import dist_checkpointing

    from shared.model import gpt, weights
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups
    from shared.training.state import write_from_threads

    (directory / "release").mkdir(parents=True)
    (directory / "hf").mkdir()
    process_groups.initialize(ParallelConfig(), 5)
    chunks = gpt.build(model, ParallelConfig(), dtype=torch.float32, perform_initialization=True)
    change(chunks[0])
    write_from_threads()
    dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(directory / "release"))
    (directory / "hf" / "config.json").write_text(json.dumps(registry.to_config(model)))
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    return directory


def write_data(target: Path, vocab_size: int = VOCAB, data_format: str = "indexed") -> Path:
    """Documents that count upwards: the next token can be learned."""
    rng = np.random.default_rng(1)
    with invoked("pretrain", "prepare", {}), publish(target, kind="dataset", inputs={}) as out:
        splits = {}
        for split, tokens in (("train", TRAIN_TOKENS), ("validation", 700)):
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


def words(source: Path, data: Path, target: Path, **options) -> list[str]:
    """The command line."""
    flags = {"source": source, "data": data, "target": target, **OPTIONS, **options}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None)]


def run(source: Path, data: Path, target: Path, **options) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        tool.run(words(source, data, target, **options))
    return ended.value.code or 0


def record(directory: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine decide."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last iteration."""
    from megatron.core import dist_checkpointing

    tracker = (directory / "latest_checkpointed_iteration.txt").read_text()
    name = tracker if tracker == "release" else f"iter_{int(tracker):07d}"
    loaded = dist_checkpointing.load_plain_tensors(str(directory / name))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
