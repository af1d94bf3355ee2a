"""The certificate: passes for a conversion, fails for every kind of subtle damage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.checkpoint.formats.hugging_face import HfReader

Make = Callable[..., Path]
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def pair(make_hf: Make, convert: Any, tmp_path: Path) -> tuple[Path, Path]:
    source, target = make_hf(), tmp_path / "megatron"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    return source, target


def certificate(target: Path) -> dict[str, Any]:
    return dict(json.loads(target.with_name(f"{target.name}.certificate.json").read_text()))


def test_every_variant_is_verified(make_hf: Make, convert: Any, variant: str, tmp_path: Path) -> None:
    source, target = make_hf(variant), tmp_path / "megatron"
    convert("to-megatron", "--source", source, "--target", target)
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 0, answer.err
    found = certificate(target)
    assert found["passed"]
    assert found["files"] == 5
    assert found["config_fields"] == len(json.loads((source / "config.json").read_text()))
    assert found["logits"] is None


def test_certificate_elsewhere(pair: tuple[Path, Path], convert: Any, tmp_path: Path) -> None:
    words = ("verify", "--source", pair[0], "--target", pair[1], "--no-logits", "--certificate")
    for place in ("c.json", "new/folder/c.json"):
        assert convert(*words, tmp_path / place).code == 0
        assert json.loads((tmp_path / place).read_text())["passed"]
    answer = convert(*words, tmp_path / "new")
    assert (answer.code, "new is a directory; name a file" in answer.err) == (2, True)
    answer = convert(*words, pair[1] / "c.json")
    assert answer.code == 2
    assert not (pair[1] / "c.json").exists()


def swap(first: str, second: str) -> Callable[[dict[str, np.ndarray]], None]:
    def swap_gate_and_up(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return swap_gate_and_up


def swap_query_and_key_rows(tensors: dict[str, np.ndarray]) -> None:
    kept = tensors[Q][:32].copy()
    tensors[Q] = np.concatenate([tensors[K], tensors[Q][32:]])
    tensors[K] = kept


def swap_groups(tensors: dict[str, np.ndarray]) -> None:
    tensors[K] = np.concatenate([tensors[K][16:], tensors[K][:16]])


def swap_layers(tensors: dict[str, np.ndarray]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.0.")]:
        other = name.replace("layers.0", "layers.1")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def one_bit(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][-1, -1] ^= 1


@pytest.mark.parametrize(
    "mutation", [swap(GATE, UP), swap_query_and_key_rows, swap_groups, swap_layers, one_bit], ids=lambda m: m.__name__
)
def test_other_weights_than_the_source_s(
    pair: tuple[Path, Path], convert: Any, mutation: Any, overwrite_tensor: Any
) -> None:
    source, target = pair
    file, reader = source / "model.safetensors", HfReader(source)
    tensors = {  # numpy has no bfloat16: the bits, as 16-bit integers
        name: np.frombuffer(b"".join(map(bytes, reader.rows(name))), np.uint16).reshape(tensor.shape)
        for name, tensor in reader.tensors.items()
    }
    before = {name: value.copy() for name, value in tensors.items()}
    mutation(tensors)
    for name, bits in tensors.items():
        if not np.array_equal(bits, before[name]):
            overwrite_tensor(file, name, lambda _, bits=bits: bits)
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    found = certificate(target)
    assert not found["passed"]
    assert found["differences"]
    assert found["differences"][0] in answer.err


def test_configuration_that_changed(pair: tuple[Path, Path], convert: Any) -> None:
    source, target = pair
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-6}))
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    assert "rms_norm_eps is 1e-05 instead of 1e-06" in answer.err


@pytest.mark.parametrize("change", ["lost", "different", "added"])
def test_file_that_is(pair: tuple[Path, Path], convert: Any, change: str) -> None:
    source, target = pair
    if change == "lost":
        (source / "special_tokens_map.json").write_text("{}")
    elif change == "different":
        (source / "chat_template.jinja").write_text("{{ message }}!")
    else:
        (source / "tokenizer.json").unlink()
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    assert {"lost": "is lost", "different": "differs", "added": "is added"}[change] in answer.err


def test_padding_that_is_not_zero(pair: tuple[Path, Path], convert: Any) -> None:
    from shared.checkpoint.formats.torch_archive import find_tensor
    from shared.checkpoint.formats.torch_dist_reader import TorchDistReader

    source, target = pair
    reader = TorchDistReader(target / "release")
    (chunk,) = reader.tensors["output_layer.weight"].chunks
    stored = find_tensor(reader._files, chunk.file, chunk.start, chunk.length)
    data = bytearray(chunk.file.read_bytes())
    data[stored.start + 259 * 64 * 2] = 1
    chunk.file.write_bytes(bytes(data))
    (target / "manifest.json").unlink()
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    assert "output_layer.weight: vocabulary padding is not zero" in answer.err


def test_not_a_number_is_reported(make_hf: Make, convert: Any, tmp_path: Path, overwrite_tensor: Any) -> None:
    source, target = make_hf(), tmp_path / "megatron"

    def poison(bits: np.ndarray) -> np.ndarray:
        changed = bits.copy()
        changed[0, 0], changed[0, 1] = 0x7FC0, 0xFF80
        return changed

    overwrite_tensor(source / "model.safetensors", GATE, poison)
    convert("to-megatron", "--source", source, "--target", target)
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 0
    assert certificate(target)["not_finite"] == {GATE: "1 NaN, 1 infinite"}
    assert GATE in answer.err


@pytest.mark.parametrize(
    ("module", "distribution"),
    [
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("megatron.core", "megatron-core"),
        ("megatron", "megatron-core"),
    ],
)
def test_where_the_models_are_not_installed_it_says_so_before_any_work(
    pair: tuple[Path, Path], convert: Any, monkeypatch: pytest.MonkeyPatch, module: str, distribution: str
) -> None:
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)  # another test may have imported it
    monkeypatch.setitem(sys.modules, module, None)  # as Python marks a module that cannot be imported
    monkeypatch.setattr("tools.convert.verify.open_checkpoint", lambda *_, **__: pytest.fail("work was begun"))
    answer = convert("verify", "--source", pair[0], "--target", pair[1])
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert f"logits need {distribution}, not installed here" in answer.err
    assert "--no-logits" in answer.err
    assert not pair[1].with_name(f"{pair[1].name}.certificate.json").exists()


WITHOUT = (
    "import sys; sys.modules.update(torch=None, transformers=None, megatron=None, safetensors=None, tokenizers=None); "
)


def test_all_but_the_logits_does_without_them(make_hf: Make, tmp_path: Path) -> None:
    """What requirements.slim.lock leaves out is imported by nothing else, in processes that have imported nothing yet."""
    source, target, back = make_hf(), tmp_path / "megatron", tmp_path / "back"
    for words in (
        ("init", "--size", "tiny", "--target", tmp_path / "init"),
        ("to-megatron", "--source", source, "--target", target),
        ("verify", "--source", source, "--target", target, "--no-logits"),
        ("to-hf", "--source", target, "--target", back),
        ("inspect", target, "--scan"),
        ("families",),
    ):
        program = f"{WITHOUT}from tools.convert.cli import tool; tool.run({[str(word) for word in words]})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
