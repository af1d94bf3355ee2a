"""Adapters with other tensor names, of other PEFT versions and with empty tensors: merged, or refused with a clear message."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.families import registry

Make = Callable[..., Path]
Tensors = dict[str, np.ndarray]
RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK
PREFIX = "base_model.model."


def write_adapter(directory: Path, tensors: Mapping[str, np.ndarray], **fields: Any) -> Path:
    directory.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]} | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


def numbers(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def of_queries(weights: Tensors, form: str = ".weight") -> Tensors:
    made: Tensors = {}
    for name in sorted(name for name in weights if name.endswith("q_proj.weight")):
        rows, columns = weights[name].shape
        module = PREFIX + name.removesuffix(".weight")
        made |= {f"{module}.lora_A{form}": numbers(len(made), RANK, columns)}
        made |= {f"{module}.lora_B{form}": numbers(len(made), rows, RANK)}
    return made


@pytest.fixture
def base(tmp_path: Path, write_architecture: Make) -> Path:
    architecture = registry.sizes()["tiny"].with_values(head={"tied": False})
    write_architecture(tmp_path / "base", architecture, dtype="fp32")
    return tmp_path / "base"


def merge(convert: Any, base: Path, adapter: Path, target: Path) -> Any:
    return convert("merge-lora", "--source", base, "--adapter", adapter, "--target", target)


@pytest.mark.parametrize("named", ["default", "policy", "my-adapter"])
def test_the_adapter_s_own_name_within_names_changes_nothing(
    base: Path, convert: Any, tmp_path: Path, named: str
) -> None:
    """`model.state_dict()` holds `lora_A.default.weight`, `save_pretrained` writes `lora_A.weight`."""
    weights = load_file(base / "model.safetensors")
    head = {"": f"{PREFIX}lm_head.weight", named: f"{PREFIX}lm_head.modules_to_save.{named}.weight"}
    for place, within in (("plain", ""), ("named", named)):
        tensors = of_queries(weights, f".{within}.weight" if within else ".weight")
        tensors[head[within]] = numbers(9, *weights["lm_head.weight"].shape)
        adapter = write_adapter(tmp_path / place, tensors, modules_to_save=["lm_head"])
        answer = merge(convert, base, adapter, tmp_path / f"{place}-out")
        assert answer.code == 0, answer.err
    plain, under = (load_file(tmp_path / f"{place}-out" / "model.safetensors") for place in ("plain", "named"))
    assert all((plain[name] == under[name]).all() for name in plain)
    assert (plain["lm_head.weight"] == numbers(9, *weights["lm_head.weight"].shape)).all()


def test_several_adapters_in_one_file_are_refused(base: Path, convert: Any, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    both = of_queries(weights, ".one.weight") | of_queries(weights, ".two.weight")
    answer = merge(convert, base, write_adapter(tmp_path / "both", both), tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "are one tensor of several adapters" in answer.err
    layers = {name: tensor for name, tensor in both.items() if ("layers.0" in name) == (".one." in name)}
    answer = merge(convert, base, write_adapter(tmp_path / "apart", layers), tmp_path / "out")
    assert "holds several adapters (one, two)" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_empty_tensor_is_refused_with_its_reason(base: Path, convert: Any, tmp_path: Path, part: str) -> None:
    tensors = of_queries(load_file(base / "model.safetensors"))
    tensors = {name: np.zeros(0, np.float32) if part in name else tensor for name, tensor in tensors.items()}
    answer = merge(convert, base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "q_proj" in answer.err
    assert "ZeRO-3" in answer.err


@pytest.fixture
def experts(tmp_path: Path, write_architecture: Make) -> Callable[[int], Path]:
    def make(inner: int) -> Path:
        size = registry.sizes()["qwen3-moe-tiny"]
        assert size.moe is not None
        expert = replace(size.moe.expert, ffn_hidden_size=inner)
        write_architecture(tmp_path / "experts", size.with_values(moe={"expert": expert}), dtype="fp32")
        return tmp_path / "experts"

    return make


def of_experts(weights: Tensors, parameter: str, swapped: bool) -> tuple[Tensors, Tensors]:
    """The tensors of an adapter and the matrices `[out, in]` that they add, gate above up."""
    tensors, added = {}, {}
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    layers = sorted({name.split(".experts.")[0] for name in weights if ".experts." in name})
    for number, layer in enumerate(layers):
        count = sum(name.startswith(f"{layer}.experts.") for name in weights) // 3
        each = [weights[f"{layer}.experts.0.{part}.weight"].shape for part in parts]
        rows, columns = sum(shape[0] for shape in each), each[0][1]
        outputs, inputs = (columns, rows) if swapped else (rows, columns)
        a, b = numbers(number, RANK * count, inputs), numbers(number + 50, outputs, RANK * count)
        tensors |= {f"{PREFIX}{layer}.experts.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
        for expert in range(count):
            delta = SCALE * b[:, expert::count].astype(np.float64) @ a[expert * RANK : (expert + 1) * RANK]
            delta = delta.T if swapped else delta
            for part, piece in zip(parts, np.split(delta, len(parts)), strict=True):
                added[f"{layer}.experts.{expert}.{part}.weight"] = piece
    return tensors, added


# inner size of an expert, parameter: gate_up_proj is square at 32 (hidden size 64), down_proj at 64
EXPERTS = [(inner, parameter) for inner in (32, 48, 64) for parameter in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize(("inner", "parameter"), EXPERTS)
@pytest.mark.parametrize(
    ("version", "swapped"),
    [("0.18.1", True), ("0.17.0", True), ("0.18.2.dev0", True), ("0.19.0", False), ("0.21.2", False)],
)
def test_experts_are_merged_as_the_peft_that_made_the_adapter_meant(
    experts: Callable[[int], Path],
    convert: Any,
    tmp_path: Path,
    inner: int,
    parameter: str,
    version: str,
    swapped: bool,
) -> None:
    base = experts(inner)
    weights = load_file(base / "model.safetensors")
    tensors, added = of_experts(weights, parameter, swapped)
    fields = {"target_modules": [], "target_parameters": [f"mlp.experts.{parameter}"], "peft_version": version}
    answer = merge(convert, base, write_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "out")
    assert answer.code == 0, answer.err
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert np.allclose(tensor, weights[name] + added.get(name, 0), atol=1e-6), name


@pytest.mark.parametrize("version", [None, "0.19.0.dev0"])
def test_a_square_expert_of_an_unknown_version_is_refused(
    experts: Callable[[int], Path], convert: Any, tmp_path: Path, version: str | None
) -> None:
    base = experts(32)
    tensors, _ = of_experts(load_file(base / "model.safetensors"), "gate_up_proj", swapped=False)
    fields = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": version}
    answer = merge(convert, base, write_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert f"peft_version is {version!r}" in answer.err


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_experts_stored_as_one_tensor_are_merged_like_single_ones(
    experts: Callable[[int], Path], convert: Any, tmp_path: Path, parameter: str, version: str
) -> None:
    """As transformers 5's classes hold them; gpt-oss, whose files hold them so, is in test_merge_lora.py."""
    base = experts(48)
    weights = load_file(base / "model.safetensors")
    tensors, _ = of_experts(weights, parameter, swapped=version < "0.19")
    fields = {"target_modules": [], "target_parameters": [f"mlp.experts.{parameter}"], "peft_version": version}
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    assert merge(convert, base, adapter, tmp_path / "single").code == 0
    save_file(fused(weights), base / "model.safetensors", metadata={"format": "pt"})
    answer = merge(convert, base, adapter, tmp_path / "one")
    assert answer.code == 0, answer.err
    wanted = fused(load_file(tmp_path / "single" / "model.safetensors"))
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def fused(weights: Tensors) -> Tensors:
    """The experts of a layer as one tensor: `[experts, gate and up, hidden]` and `[experts, hidden, inner]`."""
    made = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in weights if ".experts." in name}:
        count = sum(name.startswith(f"{layer}.experts.") for name in weights) // 3
        gate, up, down = (
            np.stack([weights[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)])
            for part in ("gate", "up", "down")
        )
        made |= {f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{layer}.experts.down_proj": down}
    return made


EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({EMBEDDING: 600}, "resized to 600 rows, lm_head.weight of the base has 512 and is not in the adapter"),
        ({EMBEDDING: 600, HEAD: 512}, "has 600 rows and lm_head.weight 512; resize both"),
    ],
)
def test_a_resized_embedding_without_its_head_is_refused(
    base: Path, convert: Any, tmp_path: Path, rows: dict[str, int], words: str
) -> None:
    tensors = {name: numbers(3, count, 64) for name, count in rows.items()}
    adapter = write_adapter(tmp_path / "adapter", of_queries(load_file(base / "model.safetensors")) | tensors)
    answer = merge(convert, base, adapter, tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert words in answer.err


def test_two_values_of_a_tied_embedding_are_refused(tmp_path: Path, write_architecture: Make, convert: Any) -> None:
    base = write_architecture(
        tmp_path / "base", registry.sizes()["tiny"].with_values(head={"tied": True}), dtype="fp32"
    )
    tensors = of_queries(load_file(base / "model.safetensors"))
    tensors |= {EMBEDDING: numbers(3, 600, 64), HEAD: numbers(4, 600, 64)}
    answer = merge(convert, base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    assert answer.code == 2
    assert (
        "lm_head.weight differs from base_model.model.model.embed_tokens.weight, but the base ties them" in answer.err
    )
    assert not (tmp_path / "out").exists()


TOKENS = [5, 250, 7]
_ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
TOKENS_REFUSED: dict[str, tuple[Any, int, str]] = {
    "no-rows": ({"lm_head": TOKENS}, 3, "which adapter_config.json does not list"),
    "fewer": (TOKENS, 2, "ask for [3, 64]"),
    "beyond": ([5, 512, 7], 3, "names token 512, model.embed_tokens.weight of the base has 512 rows"),
    "absent": ({"embed_tokens": TOKENS, "lm_head": TOKENS}, 3, "names lm_head, without tensors in the adapter"),
}


@pytest.mark.parametrize("case", TOKENS_REFUSED)
def test_trained_tokens_that_do_not_fit_are_refused(base: Path, convert: Any, tmp_path: Path, case: str) -> None:
    indices, rows, words = TOKENS_REFUSED[case]
    tensors = of_queries(load_file(base / "model.safetensors")) | {_ROWS: numbers(3, rows, 64)}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=indices)
    answer = merge(convert, base, adapter, tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert words in answer.err


def test_trained_tokens_beside_another_change_of_the_embedding_are_refused(
    base: Path, convert: Any, tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    tensors = of_queries(weights) | {
        _ROWS: numbers(3, 3, 64),
        f"{PREFIX}model.embed_tokens.weight": numbers(4, 512, 64),
    }
    fields = {"trainable_token_indices": TOKENS, "modules_to_save": ["embed_tokens"]}
    answer = merge(convert, base, write_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "is adapted beside trained rows" in answer.err
