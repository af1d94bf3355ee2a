"""The key-value cache on a machine without a GPU: enough, and never most of the memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from shared.errors import UserError
from tools.infer.settings import cpu_cache_bytes, engine_arguments

CONFIG = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}
PER_TOKEN = 2 * 4 * 2 * 32  # keys and values, layers, heads, head_dim


@pytest.fixture
def memory(monkeypatch):
    def free(size: int) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=size))

    return free


def test_it_holds_every_sequence_in_full(memory):
    memory(1 << 40)
    assert cpu_cache_bytes(CONFIG, None, 32, None) == PER_TOKEN * 2 * (1024 + 256) * 32
    assert cpu_cache_bytes(CONFIG, None, 32, "fp32") == PER_TOKEN * 4 * (1024 + 256) * 32
    assert cpu_cache_bytes(CONFIG, 256, 1, None) == PER_TOKEN * 2 * (256 + 256)


def test_it_stays_within_a_share_of_the_free_memory(memory):
    memory(4 << 20)
    assert cpu_cache_bytes(CONFIG, None, 32, None) == int((4 << 20) * 0.4)


def test_a_context_that_cannot_be_held_is_said(memory):
    memory(1 << 20)
    with pytest.raises(UserError, match="--max-model-len: one context of 1024 tokens needs"):
        cpu_cache_bytes(CONFIG, None, 32, None)


def test_the_language_model_within_another_is_what_is_cached(memory):
    """The published Gemma 3 leaves out what its class has as defaults: 4 heads of keys of 256, 131,072 tokens."""
    memory(64 << 30)
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560}
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"}
    context = 131_072 + 2 * 128
    assert cpu_cache_bytes(config, None, 1, None) == 2 * 2 * 34 * 4 * 256 * context


def test_images_that_would_be_seen_otherwise_are_not_taken(memory, tmp_path, monkeypatch, capsys):
    memory(64 << 30)
    monkeypatch.setattr("tools.infer.settings.on_gpu", lambda: False)
    flags = {"precision": None, "max_model_len": 64, "batch_size": 1, "tensor_parallel": 1}
    for kind, limit in (("gemma3", {"image": 0}), ("gemma3_text", None)):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": kind}))
        assert engine_arguments(tmp_path, **flags).get("limit_mm_per_prompt") == limit
        assert ("images are not taken: vLLM on CPU" in capsys.readouterr().err) == bool(limit)


def test_a_model_is_not_shared_among_processes_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.infer.settings.on_gpu", lambda: False)
    flags = {"precision": None, "max_model_len": None, "batch_size": None}
    with pytest.raises(UserError, match="--tensor-parallel 2: this machine has no GPU"):
        engine_arguments(tmp_path, tensor_parallel=2, **flags)
