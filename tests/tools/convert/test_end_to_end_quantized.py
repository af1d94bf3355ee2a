"""Quantised checkpoints: dequantised to Megatron, requantised to the original bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shared.checkpoint.formats.hugging_face import HfReader
from shared.families import registry

BLOCK = [24, 40]  # of tiny models: several blocks a matrix, cut at both edges
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": BLOCK,
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}
Weights = dict[str, torch.Tensor]


def as_fp8(path: Path, scale_type: torch.dtype = torch.float32, *, powers_of_two: bool = False) -> Weights:
    """Quantise a checkpoint's linear layers in place; returns the numbers that its codes stand for, by torch's casts."""
    tensors, plain = load_file(path / "model.safetensors"), {}
    for name, weight in sorted(tensors.items()):
        if (
            weight.ndim != 2
            or "embed" in name
            or "head" in name
            or name.endswith(("mlp.gate.weight", "eh_proj.weight"))
        ):
            continue
        rows, columns = (-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True))
        generator = torch.Generator().manual_seed(len(name))
        scales = (torch.rand(rows, columns, generator=generator) + 0.5) / 100
        if scale_type == torch.float8_e8m0fnu:
            scales = 2.0 ** torch.randint(-9, -4, (rows, columns), generator=generator)
        elif powers_of_two:
            scales = torch.full_like(scales, 2.0 ** math.ceil(math.log2(weight.float().abs().max() / 448)))
        scales = scales.to(scale_type)
        wide = spread(scales.float(), weight.shape)
        codes = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
        plain[name] = (codes.float() * wide).bfloat16()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    form = FP8 | ({"scale_fmt": "ue8m0"} if powers_of_two or scale_type == torch.float8_e8m0fnu else {})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": form}))
    return plain


def as_mxfp4(path: Path) -> Weights:
    """Quantise a checkpoint's experts in place; returns the numbers that their codes stand for, by transformers."""
    tensors, plain = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        generator = torch.Generator().manual_seed(len(name))
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        blocks[0, 0], scales[0, 1] = 0x80, 0  # zeros of both signs, and the smallest scale
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return plain


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for each number."""
    high, wide = BLOCK
    return scales.repeat_interleave(high, 0)[: shape[0]].repeat_interleave(wide, 1)[:, : shape[1]]


@pytest.fixture
def source(write_architecture: Callable[..., Path], tmp_path: Path) -> Path:
    return write_architecture(tmp_path / "hf", registry.sizes()["deepseek-v3-tiny"])


def done(answer: Any) -> str:
    assert answer.code == 0, answer.err
    return str(answer.err)


@pytest.mark.parametrize(
    "scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=["fp32", "bf16", "e8m0"]
)
def test_fp8_there_and_back(source: Path, convert: Any, tmp_path: Path, scale_type: torch.dtype) -> None:
    plain = as_fp8(source, scale_type)
    assert len(plain) > 40
    target, back, again = (tmp_path / name for name in ("megatron", "plain", "fp8"))
    said = done(convert("to-megatron", "--source", source, "--target", target))
    held = [name for name in plain if ".layers.2." not in name]  # layers for further tokens stay as they are
    assert f"{len(plain)} weights dequantised from FP8 (E4M3 in blocks) to bfloat16" in said
    said = done(convert("verify", "--source", source, "--target", target))
    answer = convert("to-hf", "--source", target, "--target", back)
    assert "config.json: quantization_config removed" in done(answer)
    found, stored = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert held
    assert found.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, weight in found.items():
        wanted = plain.get(name, stored[name])
        assert weight.dtype == wanted.dtype, name
        assert torch.equal(weight.view(torch.uint8), wanted.view(torch.uint8)), name
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((back / "config.json").read_text()) == config
    done(convert("to-hf", "--source", target, "--target", again, "--quantized"))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()


def test_scales_that_are_nan_are_reported(source: Path, convert: Any, tmp_path: Path) -> None:
    as_fp8(source, torch.float8_e8m0fnu)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    tensors[name].view(torch.uint8)[1, 0] = 0xFF
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert (answer.code, f"model.safetensors: {name} holds NaN in row 1" in answer.err) == (2, True), answer.err
    assert not (tmp_path / "megatron").exists()


def test_fp8_there_and_back_by_transformer_engines_form(source: Path, convert: Any, tmp_path: Path) -> None:
    as_fp8(source)
    target, again = tmp_path / "te", tmp_path / "fp8"
    done(convert("to-te", "--source", source, "--target", target))
    done(convert("verify", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", again, "--quantized"))
    for file in (file for file in source.rglob("*") if file.is_file()):
        assert (again / file.relative_to(source)).read_bytes() == file.read_bytes(), file


@pytest.fixture
def grouped(write_architecture: Callable[..., Path], tmp_path: Path) -> tuple[Path, Weights]:
    source = write_architecture(tmp_path / "hf", registry.sizes()["gpt-oss-tiny"])
    return source, as_mxfp4(source)


def test_mxfp4_there_and_back(grouped: tuple[Path, Weights], convert: Any, tmp_path: Path) -> None:
    (source, plain), (target, back, again) = grouped, (tmp_path / name for name in ("megatron", "plain", "mxfp4"))
    said = done(convert("to-megatron", "--source", source, "--target", target))
    assert "4 weights dequantised from MXFP4 to bfloat16" in said
    done(convert("verify", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", back))
    found, stored = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.keys() == plain.keys() | {n for n in stored if not n.endswith(("_blocks", "_scales"))}
    for name, weight in found.items():
        wanted = plain.get(name, stored.get(name))
        assert torch.equal(weight.view(torch.int16), wanted.view(torch.int16)), name
    done(convert("to-hf", "--source", target, "--target", again, "--quantized"))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    te = tmp_path / "te"
    done(convert("to-te", "--source", source, "--target", te))
    done(convert("to-hf", "--source", te, "--target", tmp_path / "of-te", "--quantized"))
    assert (tmp_path / "of-te" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_changed_groups_get_new_scales(grouped: tuple[Path, Weights], convert: Any, tmp_path: Path) -> None:
    (source, _), (plain, changed, target) = grouped, (tmp_path / name for name in ("plain", "changed", "megatron"))
    done(convert("to-megatron", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", plain))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors, stored = load_file(plain / "model.safetensors"), load_file(source / "model.safetensors")
    tensors[name][5, 40, 7] = 6 * 0.75 / 4  # of expert 5, in the second group of row 7
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "manifest.json").unlink()
    done(convert("to-megatron", "--source", plain, "--target", changed))
    (target / "release").rename(target / "old")
    (changed / "release").rename(target / "release")
    (target / "manifest.json").unlink()
    done(convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized"))
    found = load_file(tmp_path / "back" / "model.safetensors")
    scales, codes = (found[f"{name}_{half}"] != stored[f"{name}_{half}"] for half in ("scales", "blocks"))
    assert scales.nonzero().tolist() in ([[5, 7, 1]], [])
    assert {tuple(place[:3]) for place in codes.nonzero().tolist()} == {(5, 7, 1)}
    rest = [n for n in found if not n.startswith(name)]
    assert all(torch.equal(found[n].view(torch.uint8), stored[n].view(torch.uint8)) for n in rest)
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert (answer.code, name in answer.err) == (1, True)


def test_halves_of_mxfp4_are_asked_for(grouped: tuple[Path, Weights], convert: Any, tmp_path: Path) -> None:
    source, _ = grouped
    name = "model.layers.0.mlp.experts.down_proj"
    whole = load_file(source / "model.safetensors")
    for change, words in (
        (lambda t: t.pop(f"{name}_scales"), f"{name}_scales is missing for {name}_blocks"),
        (lambda t: t.pop(f"{name}_blocks"), f"{name} is missing"),
        (lambda t: t.update({f"{name}_scales": t[f"{name}_scales"][:1].clone()}), f"{name}_blocks requires U8"),
    ):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
        assert (answer.code, words in answer.err) == (2, True), answer.err


@pytest.mark.parametrize("scale_type", [torch.float32, torch.float8_e8m0fnu], ids=["fp32", "e8m0"])
def test_changed_blocks_get_new_scales(source: Path, convert: Any, tmp_path: Path, scale_type: torch.dtype) -> None:
    """Back through a Megatron directory in which one number has changed."""
    as_fp8(source, scale_type)
    plain, changed, target = (tmp_path / name for name in ("plain", "changed", "megatron"))
    done(convert("to-megatron", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", plain))
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors, stored = load_file(plain / "model.safetensors"), load_file(source / "model.safetensors")
    tensors[name][BLOCK[0] + 1, BLOCK[1] + 2] = 1.07 * 2**5  # which is not on the grid
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "manifest.json").unlink()
    done(convert("to-megatron", "--source", plain, "--target", changed))
    (target / "release").rename(target / "old")  # as after training: other numbers beside the same hf/
    (changed / "release").rename(target / "release")
    (target / "manifest.json").unlink()
    done(convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized"))
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == stored.keys()
    different = {n for n in found if not torch.equal(found[n].view(torch.uint8), stored[n].view(torch.uint8))}
    assert different == {name, f"{name}_scale_inv"}
    scales, before = found[f"{name}_scale_inv"].float(), stored[f"{name}_scale_inv"].float()
    assert (scales != before).nonzero().tolist() == [[1, 1]]
    block = tensors[name][BLOCK[0] : 2 * BLOCK[0], BLOCK[1] :].float()
    wanted = float(block.abs().max() / 448)
    assert scales[1, 1] == (wanted if scale_type == torch.float32 else 2.0 ** math.ceil(math.log2(wanted)))
    codes = (block / scales[1, 1]).to(torch.float8_e4m3fn)
    assert torch.equal(found[name][BLOCK[0] : 2 * BLOCK[0], BLOCK[1] :].view(torch.uint8), codes.view(torch.uint8))
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    assert name in answer.err


def test_numbers_that_give_the_same_codes_are_found_out(source: Path, convert: Any, tmp_path: Path) -> None:
    """With scales that are powers of two, numbers that changed by little have the codes and the scale that they had."""
    as_fp8(source, powers_of_two=True)
    plain, changed, target = (tmp_path / name for name in ("plain", "changed", "megatron"))
    done(convert("to-megatron", "--source", source, "--target", target))
    done(convert("to-hf", "--source", target, "--target", plain))
    tensors = load_file(plain / "model.safetensors")
    weight = tensors["model.layers.0.mlp.gate_proj.weight"]
    weight.view(torch.int16)[weight.abs() == weight[: BLOCK[0], : BLOCK[1]].abs().min()] += 1
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    (plain / "manifest.json").unlink()
    done(convert("to-megatron", "--source", plain, "--target", changed))
    (target / "release").rename(target / "old")
    (changed / "release").rename(target / "release")
    (target / "manifest.json").unlink()
    done(convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    answer = convert("verify", "--source", source, "--target", target, "--no-logits")
    assert answer.code == 1
    assert "gate_proj.weight: the dequantised values differ" in answer.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' is not supported"),
        ({"quant_method": "awq"}, "'awq' is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not supported"),
        ({"quant_method": "compressed-tensors"}, "quantization_config.format is missing"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme = 'static'"),
        (FP8 | {"weight_block_size": None}, "weight_block_size"),
        (FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2'"),
        (FP8 | {"surprise": 1}, "quantization_config.surprise = 1"),
        (None, "config.json has no quantization_config"),
        (FP8 | {"weight_block_size": [128, 128]}, "in blocks of [128, 128], requires"),
    ],
)
def test_other_forms_are_refused_by_name(
    source: Path, convert: Any, tmp_path: Path, changes: dict[str, Any] | None, words: str
) -> None:
    as_fp8(source)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": changes}
    (source / "config.json").write_text(json.dumps(config))
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    "left",
    [
        FP8,
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "one_of_tomorrow", "surprise": 1},
        {"load_in_8bit": True},
    ],
    ids=lambda left: str(left.get("quant_method")),
)
def test_a_configuration_left_over_is_ignored_whatever_its_method(
    source: Path, convert: Any, tmp_path: Path, left: dict[str, Any]
) -> None:
    """A merged or dequantised model often keeps its quantization_config; the stored dtypes say that nothing is quantised."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": left}))
    target = tmp_path / "megatron"
    assert f"quantization_config ({left.get('quant_method')}) ignored" in done(
        convert("to-megatron", "--source", source, "--target", target)
    )
    done(convert("verify", "--source", source, "--target", target, "--no-logits"))
    for place in (source, target):
        found = json.loads(convert("inspect", place, "--json").out)
        assert {"problem", "quantization"}.isdisjoint(found)
    assert "quantization_config removed" in done(convert("to-hf", "--source", target, "--target", tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    answer = convert("to-hf", "--source", target, "--target", tmp_path / "again", "--quantized")
    assert (answer.code, "no weight of the original checkpoint is quantised" in answer.err) == (2, True)


def test_scales_are_asked_for(source: Path, convert: Any, tmp_path: Path) -> None:
    as_fp8(source)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(source / "model.safetensors")
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert (answer.code, f"{name}_scale_inv is missing" in answer.err) == (2, True)
    save_file(tensors | {f"{name}_scale_inv": scales, "more_scale_inv": scales.clone()}, source / "model.safetensors")
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert (answer.code, "more_scale_inv is unknown to this family" in answer.err) == (2, True)


def test_quantized_is_for_what_was(make_hf: Callable[..., Path], convert: Any, tmp_path: Path) -> None:
    source, target = make_hf(), tmp_path / "megatron"
    done(convert("to-megatron", "--source", source, "--target", target))
    answer = convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized")
    assert (answer.code, "has no quantization_config" in answer.err) == (2, True)
    answer = convert("to-hf", "--source", target, "--target", tmp_path / "back", "--quantized", "--dtype", "bf16")
    assert (answer.code, "exclude each other" in answer.err) == (2, True)


def test_inspect_names_it(source: Path, convert: Any, tmp_path: Path) -> None:
    as_fp8(source)
    answer = convert("inspect", source, "--json", "--scan")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["quantization"] == "FP8 (E4M3 in blocks)"
    assert found["quantized_weights"] == sum(n.endswith("_scale_inv") for n in HfReader(source).tensors)
    assert "problem" not in found
