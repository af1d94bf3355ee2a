"""The round trip Hugging Face -> Megatron -> Hugging Face is byte for byte identical."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.architecture.architecture import Architecture
from shared.checkpoint.dtypes import BY_FLAG
from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.errors import UserError
from shared.families import registry
from tools.convert.verify_logits import _transformers

Make = Callable[..., Path]


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_round_trip_is_byte_identical(make_hf: Make, convert: Any, variant: str, tmp_path: Path) -> None:
    source, middle, back = make_hf(variant), tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", "--source", source, "--target", middle).code == 0
    answer = convert("to-hf", "--source", middle, "--target", back)
    assert answer.code == 0, answer.err
    assert files(back) == files(source)
    assert "MB/s" in answer.err


def test_transformers_loads_what_comes_back(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_hf("qwen3")
    convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(torch.arange(32)[None]).logits.isfinite().all()


def test_dtype_rounds_as_torch_does_and_says_so(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    import torch

    source = make_hf("llama-gqa", dtype="fp32")
    convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    answer = convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back", "--dtype", "bf16")
    assert answer.code == 0
    assert "from float32 to BF16" in answer.err
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.to(torch.bfloat16), after[name]), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_trained_weights_of_another_type_take_the_source_s_type(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    """An fp32 training run of a bf16 model: the original's layout asks for bf16."""
    source = make_hf("llama-fp32-norms")
    wide = make_hf("llama-gqa", name="wide", dtype="fp32")
    convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    convert("to-megatron", "--source", wide, "--target", tmp_path / "trained")
    shutil.copy(tmp_path / "megatron" / "hf" / "weights.json", tmp_path / "trained" / "hf" / "weights.json")
    (tmp_path / "trained" / "manifest.json").unlink()
    answer = convert("to-hf", "--source", tmp_path / "trained", "--target", tmp_path / "back")
    assert answer.code == 0, answer.err
    assert "(the original dtypes)" in answer.err
    back = HfReader(tmp_path / "back")
    assert {name: t.dtype for name, t in back.tensors.items()} == {
        name: t.dtype for name, t in HfReader(source).tensors.items()
    }


def test_vocabulary_padding_is_zero_and_stays_behind(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf("llama-gqa")
    convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert reader.tensors[key].shape == (384, 64)
        assert not any(np.frombuffer(b, np.uint8).any() for b in reader.rows(key, (), 259, 384 - 259))


def test_unknown_megatron_key_is_refused(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    """A checkpoint with biases read as one without: the bias would be lost."""
    convert("to-megatron", "--source", make_hf("llama-biases"), "--target", tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mlp_bias": False}))
    (tmp_path / "megatron" / "manifest.json").unlink()
    answer = convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back")
    assert answer.code == 2
    assert "linear_fc1.bias" in answer.err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "linear_qkv.bias and 1 more are missing"),
        ({"intermediate_size": 128}, "[2, 320, 64]"),
        ({"model_type": "mamba", "architectures": None}, "mamba"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(
    make_hf: Make, convert: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    convert("to-megatron", "--source", make_hf(), "--target", tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (tmp_path / "megatron" / "manifest.json").unlink()
    answer = convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back")
    assert answer.code == 2
    assert words in answer.err


def test_damaged_shard_layout_is_refused(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    convert("to-megatron", "--source", make_hf(), "--target", tmp_path / "megatron")
    layout = tmp_path / "megatron" / "hf" / "weights.json"
    layout.write_text(layout.read_text().replace("model.norm.weight", "model.norm.other"))
    (tmp_path / "megatron" / "manifest.json").unlink()
    answer = convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back")
    assert answer.code == 2
    assert "weights.json lacks model.norm.weight" in answer.err


REMOTE = [n for n, size in registry.sizes().items() if "tiny" in n and registry.FAMILIES[size.family].remote]


def able(architecture: Architecture) -> list[str]:
    """Families of transformers that can say this model."""
    found = []
    for name in (name for name, family in registry.FAMILIES.items() if not family.remote):
        with contextlib.suppress(UserError):
            registry.as_family(architecture, name)
            found.append(name)
    return found


@pytest.mark.parametrize("size", REMOTE)
def test_a_family_that_transformers_lacks_as_one_that_it_has(
    size: str, write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    """From either form the logits are the same, or what the other family lacks is named and nothing written."""
    architecture = registry.sizes()[size]
    source, megatron, te, target, of_te = (tmp_path / name for name in ("hf", "megatron", "te", "other", "other-of-te"))
    dtype = "fp32" if architecture.head.normalized else "bf16"  # rows that are divided are rounded, too
    write_architecture(source, architecture, dtype=dtype)
    families = able(architecture)
    for command, form, made in (("to-megatron", megatron, target), ("to-te", te, of_te)):
        assert convert(command, "--source", source, "--target", form).code == 0
        words = ("--source", form, "--target", made, "--family", families[0] if families else "llama")
        answer = convert("to-hf", *words)
        if families:
            assert answer.code == 0, answer.err
            continue
        assert answer.code == 2
        assert f"--family llama cannot represent this {architecture.family} model" in answer.err
        assert f"omit --family to write it as {architecture.family}" in answer.err
        assert not made.exists()
    if not families:
        return
    if architecture.head.normalized:
        assert "lm_head.weight: rows divided by their L2 norms" in answer.err
        trained, written = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (source, target))
        assert torch.equal(written, torch.nn.functional.normalize(trained.double()).float())
    for name in ("config.json", "model.safetensors"):
        assert (target / name).read_bytes() == (of_te / name).read_bytes()
    ids = torch.randint(architecture.vocab_size, (1, 256), generator=torch.Generator().manual_seed(2))
    theirs = _transformers(source, architecture, ids, True)
    difference = (_transformers(target, registry.from_files(target), ids, False) - theirs).abs().max()
    assert difference < 1e-4 * theirs.std()  # fp32 sums in another order
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert {tensor.dtype for tensor in HfReader(target).tensors.values()} == {BY_FLAG[dtype].safetensors}
