"""vLLM's arguments without a GPU: size of the KV cache, refused settings."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from shared.errors import UserError
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.vllm_arguments import cpu_cache_bytes, engine_arguments

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


def test_the_cache_holds_every_sequence_in_full(memory):
    memory(1 << 40)
    assert cpu_cache_bytes(CONFIG, None, 32, "bf16") == PER_TOKEN * 2 * (1024 + 256) * 32
    assert cpu_cache_bytes(CONFIG, None, 32, "fp32") == PER_TOKEN * 4 * (1024 + 256) * 32
    assert cpu_cache_bytes(CONFIG, 256, 1, "bf16") == PER_TOKEN * 2 * (256 + 256)


def test_the_cache_stays_within_a_share_of_the_free_memory(memory):
    memory(4 << 20)
    assert cpu_cache_bytes(CONFIG, None, 32, "bf16") == int((4 << 20) * 0.4)


def test_a_context_without_room_is_refused(memory):
    memory(1 << 20)
    with pytest.raises(UserError, match="--max-model-len: the KV cache of one context of 1024 tokens takes"):
        cpu_cache_bytes(CONFIG, None, 32, "bf16")


def test_the_cache_is_that_of_a_multimodal_wrappers_language_model(memory):
    """The published Gemma 3 leaves out the defaults of its class: 4 KV heads of 256, 131,072 tokens."""
    memory(64 << 30)
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560}
    config = {"model_type": "gemma3", "text_config": text}
    context = 131_072 + 2 * 128
    assert cpu_cache_bytes(config, None, 1, "bf16") == 2 * 2 * 34 * 4 * 256 * context


def test_images_are_refused_where_their_attention_is_bidirectional(memory, tmp_path, monkeypatch, capsys):
    memory(64 << 30)
    monkeypatch.setattr("tools.infer.engines.vllm_arguments.on_gpu", lambda: False)
    settings = EngineSettings(max_model_len=64, batch_size=1)
    for kind, limit in (("gemma3", {"image": 0}), ("gemma3_text", None)):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": kind}))
        assert engine_arguments(tmp_path, settings).get("limit_mm_per_prompt") == limit
        assert ("images are refused: vLLM's CPU attention" in capsys.readouterr().err) == bool(limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vllm_is_told_the_checkpoints_precision(dtype, memory, tmp_path, monkeypatch):
    """Its own default, "auto", would compute an fp32 checkpoint in 16 bits."""
    memory(64 << 30)
    monkeypatch.setattr("tools.infer.engines.vllm_arguments.on_gpu", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dtype": dtype}))
    arguments = engine_arguments(tmp_path, EngineSettings(batch_size=1))
    assert arguments["dtype"] == dtype
    width = 4 if dtype == "float32" else 2
    assert arguments["kv_cache_memory_bytes"] == PER_TOKEN * width * (1024 + 256)
    assert engine_arguments(tmp_path, EngineSettings(precision="bf16"))["dtype"] == "bfloat16"


def test_tensor_parallel_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.infer.engines.vllm_arguments.on_gpu", lambda: False)
    with pytest.raises(UserError, match="--tensor-parallel 2: this machine has no GPU"):
        engine_arguments(tmp_path, EngineSettings(tensor_parallel=2, precision="bf16"))
