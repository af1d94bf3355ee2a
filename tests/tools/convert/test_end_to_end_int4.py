"""Checkpoints with int4 experts (Kimi K2 Thinking): dequantised to Megatron, requantised to the original bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint.formats.hugging_face import HfReader
from shared.families import registry

WEIGHTS = {
    **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4},
    **{"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"},
}
GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}
FORM: dict[str, Any] = {
    "config_groups": {"group_0": GROUP},
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def as_int4(path: Path) -> dict[str, torch.Tensor]:
    """Quantise a checkpoint's experts in place; returns the numbers that their codes stand for, by torch in bf16."""
    tensors, plain = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        rows, columns = tensors.pop(name).shape
        generator = torch.Generator().manual_seed(len(plain))
        codes = torch.randint(16, (rows, columns), generator=generator)
        codes[0] = 8  # zeros
        scales = ((torch.rand(rows, columns // 32, generator=generator) + 0.5) / 10).bfloat16()
        shifts = 2 ** (4 * torch.arange(8))
        words = (codes.view(rows, -1, 8) * shifts).sum(-1)  # the first in the lowest bits
        tensors[f"{name}_packed"] = (words - (words >= 2**31) * 2**32).to(torch.int32)
        tensors[f"{name}_scale"], tensors[f"{name}_shape"] = scales, torch.tensor([rows, columns])
        plain[name] = (codes - 8).bfloat16() * scales.repeat_interleave(32, 1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": FORM}))
    return plain


@pytest.fixture
def source(write_architecture: Callable[..., Path], tmp_path: Path) -> Path:
    return write_architecture(tmp_path / "hf", registry.sizes()["deepseek-v3-tiny"])


def done(answer: Any) -> str:
    assert answer.code == 0, answer.err
    return str(answer.err)


def test_there_and_back(source: Path, convert: Any, tmp_path: Path) -> None:
    plain = as_int4(source)
    target, back, again, te = (tmp_path / name for name in ("megatron", "plain", "int4", "te"))
    said = done(convert("to-megatron", "--source", source, "--target", target))
    assert f"{len(plain)} weights dequantised from int4 in groups (compressed-tensors) to bfloat16" in said
    done(convert("verify", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", back))
    found, stored = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    halves = ("_packed", "_scale", "_shape")
    assert found.keys() == plain.keys() | {name for name in stored if not name.endswith(halves)}
    for name, weight in found.items():
        wanted = plain.get(name, stored.get(name))
        assert torch.equal(weight.view(torch.uint8), wanted.view(torch.uint8)), name
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    done(convert("to-hf", "--source", target, "--target", again, "--quantized"))
    done(convert("to-te", "--source", source, "--target", te))
    done(convert("to-hf", "--source", te, "--target", tmp_path / "of-te", "--quantized"))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "of-te" / name).read_bytes() == (source / name).read_bytes()
    inspected = json.loads(convert("inspect", source, "--json").out)
    assert (inspected["quantization"], inspected["quantized_weights"]) == (
        "int4 in groups (compressed-tensors)",
        len(plain),
    )


def test_windows_of_any_kind_are_parts_of_the_whole(source: Path) -> None:
    plain = as_int4(source)
    reader = HfReader(source)
    weight, whole = reader.weights[EXPERT], plain[EXPERT]
    rows, columns = whole.shape
    for row, count, first, width in ((0, rows, 0, columns), (3, 5, 1, columns - 1), (2, 1, 7, 9), (0, rows, 31, 1)):
        out = bytearray(count * width * 2)
        weight.view().read(reader._files, row, count, 2 * first, 2 * width, memoryview(out))
        found = torch.frombuffer(out, dtype=torch.int16).view(count, width)
        assert torch.equal(found, whole.view(torch.int16)[row : row + count, first : first + width])


def test_changed_groups_get_new_scales(source: Path, convert: Any, tmp_path: Path) -> None:
    """Back through a Megatron directory in which one number has changed."""
    as_int4(source)
    plain, changed, target = (tmp_path / name for name in ("plain", "changed", "megatron"))
    done(convert("to-megatron", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", plain))
    tensors, stored = load_file(plain / "model.safetensors"), load_file(source / "model.safetensors")
    tensors[EXPERT][5, 7] = 3.0
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "manifest.json").unlink()
    done(convert("to-megatron", "--source", plain, "--target", changed))
    (target / "release").rename(target / "old")  # as after training: other numbers beside the same hf/
    (changed / "release").rename(target / "release")
    (target / "manifest.json").unlink()
    done(convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized"))
    found = load_file(tmp_path / "back" / "model.safetensors")
    scales, words = (found[f"{EXPERT}_{half}"] != stored[f"{EXPERT}_{half}"] for half in ("scale", "packed"))
    assert scales.nonzero().tolist() == [[5, 0]]
    assert found[f"{EXPERT}_scale"][5, 0] == torch.tensor(3.0).bfloat16() / 7.5
    assert {tuple(place) for place in words.nonzero().tolist()} <= {(5, word) for word in range(4)}
    assert (found[f"{EXPERT}_packed"][5, 0] >> 28) & 15 == 15  # the largest code there is
    rest = [name for name in found if not name.startswith(EXPERT)]
    assert all(torch.equal(found[n].view(torch.uint8), stored[n].view(torch.uint8)) for n in rest)
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert (answer.code, EXPERT in answer.err) == (1, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{EXPERT}_scale"), f"{EXPERT}_scale is missing for {EXPERT}_packed"),
        (lambda t: t.pop(f"{EXPERT}_shape"), f"{EXPERT}_shape is missing for {EXPERT}_packed"),
        (lambda t: t.pop(f"{EXPERT}_packed"), f"{EXPERT} is missing"),
        (lambda t: t.update({f"{EXPERT}_scale": t[f"{EXPERT}_scale"].float()}), "requires BF16[64, 1]"),
        (
            lambda t: t.update({f"{EXPERT}_packed": t[f"{EXPERT}_packed"][:, :3].clone()}),
            "I32[out, in / 8] is required, with in a multiple of 32",
        ),
        (
            lambda t: t[f"{EXPERT}_shape"].fill_(31),
            f"{EXPERT}_shape is [31, 31], but {EXPERT}_packed holds a [64, 32] weight",
        ),
        (lambda t: t[f"{EXPERT}_scale"].fill_(torch.nan), f"{EXPERT}_scale holds NaN or infinity"),
        (lambda t: t.update({f"{EXPERT}_zero_point": torch.zeros(8, 1)}), f"{EXPERT}_zero_point is unknown"),
        (lambda t: t.update({f"{EXPERT}_g_idx": torch.zeros(32)}), f"{EXPERT}_g_idx is unknown"),
    ],
)
def test_parts_are_asked_for(source: Path, convert: Any, tmp_path: Path, change: Any, words: str) -> None:
    as_int4(source)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert (answer.code, words in answer.err) == (2, True), answer.err
    assert not (tmp_path / "megatron").exists()


WHERE = "quantization_config.config_groups.group_0."


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "int-quantized", "quantization_config.format = 'int-quantized' is not supported"),
        (("format",), None, "quantization_config.format is missing"),
        (("kv_cache_scheme",), {"num_bits": 8}, "quantization_config.kv_cache_scheme = {'num_bits': 8} is unknown"),
        (("sparsity_config",), {"format": "sparse-24-bitmask"}, "quantization_config.sparsity_config = "),
        (("quantization_status",), "frozen", "quantization_config.quantization_status = 'frozen' is not supported"),
        (("config_groups",), {}, "quantization_config.config_groups is {}"),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}, f"{WHERE}input_activations = "),
        (("config_groups", "group_0", "weights"), None, f"{WHERE}weights is None"),
        (("config_groups", "group_0", "weights", "num_bits"), 8, f"{WHERE}weights.num_bits = 8 is not supported"),
        (("config_groups", "group_0", "weights", "type"), "float", f"{WHERE}weights.type = 'float'"),
        (("config_groups", "group_0", "weights", "symmetric"), False, f"{WHERE}weights.symmetric = False"),
        (("config_groups", "group_0", "weights", "strategy"), "channel", f"{WHERE}weights.strategy = 'channel'"),
        (("config_groups", "group_0", "weights", "group_size"), 128, f"{WHERE}weights.group_size = 128"),
        (("config_groups", "group_0", "weights", "group_size"), None, f"{WHERE}weights.group_size is missing"),
        (("config_groups", "group_0", "weights", "dynamic"), True, f"{WHERE}weights.dynamic = True"),
        (
            ("config_groups", "group_0", "weights", "actorder"),
            "group",
            f"{WHERE}weights.actorder = 'group' is unknown and may change the weights",
        ),
    ],
)
def test_other_forms_are_refused_by_name(
    source: Path, convert: Any, tmp_path: Path, path: tuple[str, ...], value: Any, words: str
) -> None:
    as_int4(source)
    form = copy.deepcopy(FORM)
    at = form
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": form}
    (source / "config.json").write_text(json.dumps(config))
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert (answer.code, words in answer.err) == (2, True), answer.err
    assert "fetch " in answer.err
    assert not (tmp_path / "megatron").exists()
