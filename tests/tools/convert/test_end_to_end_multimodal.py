"""Multimodal models: the language model is converted, pass-through tensors are kept, a loss of tensors is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.architecture.architecture import Architecture
from shared.families import registry

Tensors = dict[str, torch.Tensor]
# What files call the parts: as published, as transformers 5 saves them, and as its class names them.
SPELLINGS = {
    "published": {},
    "saved": {"vision_tower.vision_model.": "vision_tower."},
    "of the class": {
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "of the class of transformers 4": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
FORMS = ("megatron", "te")


@pytest.fixture
def architecture() -> Architecture:
    return registry.sizes()["gemma3-images-tiny"]


@pytest.fixture
def source(architecture: Architecture, write_architecture: Any, tmp_path: Path) -> Path:
    path = Path(write_architecture(tmp_path / "hf", architecture))
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return path


@pytest.fixture
def megatron(source: Path, convert: Any, tmp_path: Path) -> Path:
    target = tmp_path / "megatron"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    return target


def change(directory: Path, how: Callable[[Tensors], Tensors]) -> None:
    path = directory / "model.safetensors"
    save_file(how(load_file(path)), path, {"format": "pt"})


def respelt(tensors: Tensors, names: dict[str, str]) -> Tensors:
    def called(name: str) -> str:
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        return names.get(prefix, "") + name.removeprefix(prefix)

    return {called(name): tensor for name, tensor in tensors.items()}


def without_manifest(directory: Path) -> Path:
    """As if another program had written it."""
    (directory / "manifest.json").unlink()
    return directory


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_comes_back_as_it_was(source: Path, convert: Any, tmp_path: Path, spelling: str) -> None:
    change(source, lambda tensors: respelt(tensors, SPELLINGS[spelling]))
    for form in FORMS:
        target, back = tmp_path / form, tmp_path / f"{form}.back"
        answer = convert(f"to-{form}", "--source", source, "--target", target)
        assert answer.code == 0, answer.err
        assert "mm_input_projection_weight and 38 more: pass-through tensors, kept in hf/ and not trained" in answer.err
        answer = convert("verify", "--source", source, "--target", target)
        assert answer.code == 0, answer.err  # with logits, of Megatron's form: transformers reads every spelling
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        for file in (path for path in source.rglob("*") if path.is_file()):
            assert (back / file.relative_to(source)).read_bytes() == file.read_bytes(), file
        for directory in (source, target, back):
            assert "problem" not in json.loads(convert("inspect", directory, "--json").out)


def test_a_model_that_transformers_saved(convert: Any, tmp_path: Path, architecture: Architecture) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration(Gemma3Config.from_dict(registry.to_config(architecture)))
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size="200KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    answer = convert("to-megatron", "--source", source, "--target", target)
    assert answer.code == 0, answer.err
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    for file in source.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file


TOWER = "vision_tower.vision_model."
_LAST = f"{TOWER}encoder.layers.1.mlp.fc2.bias"
_WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one is missing": (lambda t: {n: x for n, x in t.items() if n != _LAST}, f"{_LAST} is missing, though config.json"),
    "the tower is missing": (
        lambda t: {n: x for n, x in t.items() if not n.startswith("vision_tower.")},
        f"{TOWER}embeddings.patch_embedding.weight and 36 more are missing",
    ),
    "one more layer": (
        lambda t: t | {f"{TOWER}encoder.layers.2.mlp.fc2.bias": t[_LAST].clone()},
        f"{TOWER}encoder.layers.2.mlp.fc2.bias is unknown to this family and would be lost",
    ),
    "another part": (lambda t: t | {"audio_tower.a": torch.ones(2)}, "audio_tower.a is unknown to this family"),
    "another shape": (lambda t: t | {_LAST: torch.ones(31)}, f"{_LAST} is [31], config.json asks for [32]"),
}


@pytest.mark.parametrize("wrong", _WRONG)
def test_what_is_beside_is_accounted_for(source: Path, convert: Any, tmp_path: Path, wrong: str) -> None:
    how, message = _WRONG[wrong]
    change(source, how)
    for form in FORMS:
        answer = convert(f"to-{form}", "--source", source, "--target", tmp_path / form)
        assert answer.code == 2
        assert message in answer.err
        assert not (tmp_path / form).exists()
    assert message in json.loads(convert("inspect", source, "--json").out)["problem"]


@pytest.mark.parametrize("lost", ["all", "one", "shape"])
def test_nothing_is_exported_without_it(source: Path, megatron: Path, convert: Any, tmp_path: Path, lost: str) -> None:
    """Neither where hf/ lost it, nor where a program that never had it wrote the weights."""
    pass_through = without_manifest(megatron) / "hf" / "asides.safetensors"
    kept = load_file(pass_through)
    pass_through.unlink()
    if lost == "one":
        save_file({name: tensor for name, tensor in kept.items() if name != _LAST}, pass_through)
    if lost == "shape":
        save_file(kept | {_LAST: torch.ones(31)}, pass_through)
    message = f"{_LAST} is [31], config.json asks for [32]" if lost == "shape" else "of the multimodal wrapper"
    for layout in (True, False):
        if not layout:
            (megatron / "hf" / "weights.json").unlink()
        answer = convert("to-hf", "--source", megatron, "--target", tmp_path / "back")
        assert answer.code == 2
        assert message in answer.err
        assert not (tmp_path / "back").exists()
        assert message in json.loads(convert("inspect", megatron, "--json").out)["problem"]


def test_weights_of_another_program_are_joined_with_the_rest_of_the_model(
    source: Path, megatron: Path, convert: Any, tmp_path: Path
) -> None:
    """--hf-files with the model's own directory has what the other program never saw, under its names."""
    shutil.rmtree(without_manifest(megatron) / "hf")
    change(source, lambda tensors: respelt(tensors, SPELLINGS["of the class"]))
    words = ("--source", megatron, "--hf-files", source)
    answer = convert("to-hf", *words, "--target", tmp_path / "back")
    assert answer.code == 0, answer.err
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "back", source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    (source / "model.safetensors").unlink()
    answer = convert("to-hf", *words, "--target", tmp_path / "without")
    assert answer.code == 2
    assert "give --hf-files the model's Hugging Face directory with its weights" in answer.err


def test_another_type_is_that_of_the_language_model(source: Path, megatron: Path, convert: Any, tmp_path: Path) -> None:
    answer = convert("to-hf", "--source", megatron, "--target", tmp_path / "back", "--dtype", "fp32")
    assert answer.code == 0
    assert "as in the original checkpoint; they stay BF16, --dtype is of the others" in answer.err
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if name.startswith("language_model.") else torch.bfloat16), name
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


def test_the_language_model_alone(source: Path, megatron: Path, convert: Any, tmp_path: Path) -> None:
    """`--family gemma3` leaves the rest out and says so; it is what transformers computes of text in the whole."""
    from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    answer = convert("to-hf", "--source", megatron, "--target", tmp_path / "alone", "--family", "gemma3")
    assert answer.code == 0, answer.err
    assert "39 pass-through tensors left out, gemma3 has none" in answer.err
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        alone = Gemma3ForCausalLM.from_pretrained(tmp_path / "alone", **options)(ids).logits
        whole = Gemma3ForConditionalGeneration.from_pretrained(source, **options)(ids).logits
    assert torch.equal(alone, whole)


def test_weights_of_what_sees_are_not_drawn(convert: Any, tmp_path: Path) -> None:
    answer = convert("init", "--target", tmp_path / "new", "--size", "gemma3-images-tiny")
    assert answer.code == 2
    assert "init writes language models only, gemma3_images has 39 tensors of a multimodal wrapper" in answer.err
    assert not (tmp_path / "new").exists()
