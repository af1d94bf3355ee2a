"""Random checkpoints that transformers loads and pretraining starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.checkpoint.dtypes import BY_SAFETENSORS, to_float32
from shared.checkpoint.formats.hugging_face import HfReader
from shared.families import registry


def values(reader: HfReader, name: str) -> np.ndarray:
    dtype = BY_SAFETENSORS[reader.tensors[name].dtype]
    return np.concatenate([to_float32(block, dtype).copy() for block in reader.rows(name)])


@pytest.mark.parametrize("size", [n for n, a in registry.sizes().items() if "tiny" in n and not a.vision])
def test_weights_are_distributed_as_transformers_draws_them(convert: Any, tmp_path: Path, size: str) -> None:
    architecture = registry.sizes()[size]
    entries = registry.table_of(architecture).entries()
    norms = {source.name: entry for entry in entries for source in entry.sources if "norm" in entry.key}
    assert convert("init", "--target", tmp_path / "m", "--size", size).code == 0
    reader = HfReader(tmp_path / "m")
    assert registry.from_config(reader.config) == architecture
    drawn = []
    for name in reader.tensors:
        found = values(reader, name)
        if name.endswith("A_log"):  # logarithms of numbers spread evenly up to 16
            assert np.exp(found).min() > 0
            assert 1 < np.exp(found).max() <= 16.1
        elif name.endswith("dt_bias"):
            assert (found == 1).all()
        elif name.endswith("bias") and not name.endswith("router.bias"):  # gpt-oss's, drawn like a weight
            assert (found == 0).all(), name
            assert name.endswith((".bias", "_proj_bias")) or reader.tensors[name].dtype == "F32", name
        elif name in norms:
            zero_centered = architecture.layers[0].norm.zero_centered_gamma and not norms[name].zero_centered_gamma
            assert (found == (0 if zero_centered else 1)).all(), name
        else:
            few = found.size**-0.5  # how far off the deviation of so few numbers is
            assert found.std() == pytest.approx(architecture.initializer_range, rel=max(0.1, 3 * few)), name
            assert abs(found.mean()) < max(0.002, 4 * few * architecture.initializer_range), name
            drawn.append(found)
    one, other = drawn[1], drawn[2]
    assert abs(np.corrcoef(one[: min(one.size, other.size)], other[: min(one.size, other.size)])[0, 1]) < 0.1


def test_seed_decides(convert: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert("init", "--target", tmp_path / name, "--size", "tiny", "--seed", seed, "--dtype", "fp32")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_vocabulary_and_special_tokens_of_a_tokenizer(convert: Any, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    added = [{"id": 300, "content": "<eos>"}, {"id": 301, "content": "<pad>"}]
    vocabulary = {chr(200 + i): i for i in range(300)}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    settings = {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}, "bos_token": None}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ("init", "--target", tmp_path / "m", "--size", "tiny", "--tokenizer", tokenizer)
    assert convert(*words, "--max-position-embeddings", "1024").code == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (302, 1024)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 300, 301)
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 300


def test_configuration_file(convert: Any, tmp_path: Path) -> None:
    architecture = registry.sizes()["qwen2-tiny"]
    config = registry.to_config(architecture, some_bookkeeping=None)
    del config["rope_parameters"]  # transformers 4's spelling
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert("init", "--target", tmp_path / "m", "--model-config", tmp_path / "config.json").code == 0
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == architecture.attention.rotary.theta
    assert registry.from_config(written) == architecture


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --size NAME or --model-config FILE"),
        (("--size", "llama-3.1-8"), "did you mean llama-3.1-8b"),
        (("--size", "tiny", "--tokenizer", "."), "holds no tokenizer.json"),
    ],
)
def test_mistakes(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = convert("init", "--target", tmp_path / "m", *words)
    assert answer.code == 2
    assert message in answer.err


def test_transformers_loads_it(convert: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    convert("init", "--target", tmp_path / "m", "--size", "qwen2-tiny")
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(notes[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == registry.sizes()["qwen2-tiny"].parameter_count()
