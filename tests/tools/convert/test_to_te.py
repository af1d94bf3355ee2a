"""TransformerEngine directories: round trip of every family, and logits of the layers.

Importing TransformerEngine needs a GPU; `tests/references/transformer_engine.py` reimplements it in plain torch. The model is
built from the directory only, loaded strictly, and compared with transformers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.mapping.layout import Interleave
from shared.mapping.rule import Rule
from shared.mapping.transformer_engine import te_form

CHOSEN = os.environ.get("FAMILIES", "").split()
TINY = {
    name: replace(size, vocab_size=509)
    for name, size in registry.sizes().items()
    if "tiny" in name and (not CHOSEN or size.family in CHOSEN)
}
GOLDEN = Path(__file__).parents[2] / "golden"
POSITIONS = 200
# fp32 sums in another order, as `convert verify` explains: 1e-4 of the logits' spread.
TOLERANCE = 1e-4


def whole(architecture: Architecture) -> bool:
    """Whether every layer is a TransformerLayer."""
    layers = te_form(registry.table_of(architecture), architecture).modules["layers"]
    return all("class" in layer for layer in layers)


WHOLE = [name for name, size in TINY.items() if whole(size)]


def reference(name: str) -> Any:
    path = Path(__file__).parents[2] / "references" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


MODEL, ENGINE = reference("te_model"), reference("transformer_engine")


@pytest.mark.parametrize("size", TINY)
def test_every_family_comes_back_byte_for_byte(
    size: str, write_architecture: Any, convert: Any, tmp_path: Path, proof: Any
) -> None:
    source, target, back = (tmp_path / name for name in ("hf", "te", "back"))
    write_architecture(source, TINY[size])
    with proof("te round trip", size=size):
        assert convert("to-te", "--source", source, "--target", target).code == 0
        answer = convert("verify", "--source", source, "--target", target)
        assert answer.code == 0, answer.err
        assert "logits: not compared" in answer.err
        found = json.loads(convert("inspect", target, "--json").out)
        assert found["kind"] == "te"
        assert "problem" not in found
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        for file in (file for file in source.rglob("*") if file.is_file()):
            assert (back / file.relative_to(source)).read_bytes() == file.read_bytes(), file


def test_every_variant_comes_back_byte_for_byte(
    variant: str, make_hf: Callable[..., Path], convert: Any, tmp_path: Path
) -> None:
    source = make_hf(variant)
    assert convert("to-te", "--source", source, "--target", tmp_path / "te").code == 0
    answer = convert("verify", "--source", source, "--target", tmp_path / "te")
    assert answer.code == 0, answer.err
    assert convert("to-hf", "--source", tmp_path / "te", "--target", tmp_path / "back").code == 0
    for file in (file for file in source.rglob("*") if file.is_file()):
        assert (tmp_path / "back" / file.relative_to(source)).read_bytes() == file.read_bytes(), file


def theirs(source: Path, ids: torch.Tensor, *, remote: bool) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", trust_remote_code=remote
    )
    with torch.no_grad():
        return model.eval()(ids).logits


def some_ids() -> torch.Tensor:
    return torch.randint(509, (2, POSITIONS), generator=torch.Generator().manual_seed(1))


def differs(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((made - expected).abs().max() > TOLERANCE * expected.std())


@pytest.mark.parametrize("size", WHOLE)
def test_the_layers_compute_what_transformers_does(
    size: str,
    write_architecture: Any,
    convert: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
) -> None:
    a = TINY[size]
    source = write_architecture(tmp_path / "hf", a, dtype="fp32")
    expected = theirs(source, some_ids(), remote=registry.FAMILIES[a.family].remote)
    assert convert("to-te", "--source", source, "--target", tmp_path / "te").code == 0
    model = MODEL.Model(tmp_path / "te", ENGINE.TransformerLayer)
    assert not differs(model(some_ids()), expected)
    for name, description in careless_builds(a, MODEL.described(tmp_path / "te")):
        with subtests.test(name):
            assert differs(MODEL.Model(tmp_path / "te", ENGINE.TransformerLayer, description)(some_ids()), expected)
    family = registry.FAMILIES[a.family]
    for index, (name, change) in enumerate(mistakes(a)):
        table = family.table(a)
        wrong = replace(table, rules=tuple(change(rule) for rule in table.rules))
        monkeypatch.setitem(registry.FAMILIES, a.family, replace(family, own_table=lambda _, wrong=wrong: wrong))
        assert convert("to-te", "--source", source, "--target", tmp_path / f"te{index}").code == 0
        with subtests.test(name):
            assert differs(MODEL.Model(tmp_path / f"te{index}", ENGINE.TransformerLayer)(some_ids()), expected)


def careless_builds(a: Architecture, description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions with one argument read as another, where the tensors still fit."""
    rotary = next((kind.mixer.rotary for kind in a.kinds if getattr(kind.mixer, "rotary", None)), None)
    mlp = a.feed_forward
    wrong: dict[str, Any] = {"rotary_pos_interleaved": not rotary.interleaved} if rotary else {}
    wrong |= {"layernorm_epsilon": 0.1, "zero_centered_gamma": not a.layers[0].norm.zero_centered_gamma}
    wrong |= {"qkv_weight_interleaved": False} if a.attention.groups > 1 else {}
    wrong |= {"window_size": None} if any(getattr(kind.mixer, "window", None) for kind in a.kinds) else {}
    wrong |= {"parallel_attention_mlp": a.layers[0].residual.kind != "parallel"}
    wrong |= {"activation": "reglu" if mlp.gated else "relu" if mlp.activation != "relu" else "gelu"}
    wrong |= {"qk_norm_before_rope": False} if getattr(a.attention, "qk_norm", None) else {}
    for name, value in wrong.items():
        layers = [layer | {"arguments": layer["arguments"] | {name: value}} for layer in description["layers"]]
        yield name, description | {"layers": layers}
    if any(layer["call"] for layer in description["layers"]):
        yield "call", description | {"layers": [layer | {"call": {}} for layer in description["layers"]]}
    if rotary and any(kind.mixer.rotary is None for kind in a.kinds):
        call = next(layer["call"] for layer in description["layers"] if layer["call"])
        yield "NoPE", description | {"layers": [layer | {"call": call} for layer in description["layers"]]}


def mistakes(a: Architecture) -> Iterator[tuple[str, Callable[[Rule], Rule]]]:
    """Mistakes in the order of rows, which undo themselves on the way back."""

    def swapped(ending: str, **changes: Callable[[Any], Any]) -> Callable[[Rule], Rule]:
        def wrong(rule: Rule) -> Rule:
            if not rule.megatron.endswith(ending):
                return rule
            return replace(rule, **{name: change(getattr(rule, name)) for name, change in changes.items()})

        return wrong

    rules = {rule.megatron.rpartition("layers.")[2]: rule for rule in registry.table_of(a).rules}
    qkv = next(rule for key, rule in rules.items() if key.endswith("linear_qkv.weight"))
    fc1 = next(rule for key, rule in rules.items() if key.endswith("mlp.linear_fc1.weight"))
    if len(fc1.sources) == 2:
        yield "gate and up", swapped("mlp.linear_fc1.weight", sources=lambda sources: sources[::-1])
    if len(qkv.sources) == 3:
        yield (
            "key and value",
            swapped("linear_qkv.weight", sources=lambda sources: (sources[0], sources[2], sources[1])),
        )
        if a.attention.groups > 1:
            yield "blocks of queries, keys and values", swapped("linear_qkv.weight", layout=lambda _: Interleave())


def test_biases_that_the_model_lacks_are_zero_and_must_stay(
    write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    source, target = write_architecture(tmp_path / "hf", registry.sizes()["qwen2-tiny"]), tmp_path / "te"
    assert convert("to-te", "--source", source, "--target", target).code == 0
    state = load_file(target / "model.safetensors")
    zeros = ("self_attention.proj.bias", "layernorm_mlp.fc1_bias", "layernorm_mlp.fc2_bias")
    for name in (f"layers.{layer}.{name}" for layer in (0, 1) for name in zeros):
        assert not state[name].any()
        assert state[name].dtype == torch.bfloat16
    assert state["layers.0.self_attention.layernorm_qkv.bias"].any()
    state["layers.1.layernorm_mlp.fc2_bias"][-1] = 0.5
    trained = saved(target, tmp_path / "trained", state)
    answer = convert("to-hf", "--source", trained, "--target", tmp_path / "back")
    assert answer.code == 2
    assert "layers.1.layernorm_mlp.fc2_bias is not zero" in answer.err
    assert not (tmp_path / "back").exists()
    answer = convert("verify", "--source", source, "--target", trained)
    assert answer.code == 1
    assert "layers.1.layernorm_mlp.fc2_bias is not zero" in answer.err


def saved(target: Path, path: Path, state: dict[str, torch.Tensor]) -> Path:
    """What a person's own training leaves: its weights, and the rest of the directory copied."""
    path.mkdir()
    shutil.copytree(target / "hf", path / "hf")
    shutil.copy(target / "layers.json", path / "layers.json")
    save_file(state, path / "model.safetensors")
    return path


def test_weights_that_another_program_saved(
    write_architecture: Any, convert: Any, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    source, target = write_architecture(tmp_path / "hf", registry.sizes()["tiny"]), tmp_path / "te"
    assert convert("to-te", "--source", source, "--target", target).code == 0
    model = MODEL.Model(target, ENGINE.TransformerLayer)
    state = load_file(target / "model.safetensors")
    state |= {f"layers.{name}": tensor.clone() for name, tensor in model.layers.state_dict().items()}
    key = "layers.1.self_attention.layernorm_qkv.weight"
    state[key] = state[key] * 2
    state["layers.0.self_attention.proj._extra_state"] = torch.arange(9, dtype=torch.uint8)  # of training in FP8
    with subtests.test("comes back, with what was trained"):
        trained = saved(target, tmp_path / "trained", {name: tensor.bfloat16() for name, tensor in state.items()})
        answer = convert("to-hf", "--source", trained, "--target", tmp_path / "back")
        assert answer.code == 0, answer.err
        left_out = "layers.0.self_attention.proj._extra_state: FP8 scales and amax histories, left out"
        assert left_out in answer.err
        before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}
        assert all(torch.equal(after[name], before[name] * 2) for name in changed)
    with subtests.test("in another type"):
        trained = saved(target, tmp_path / "wide", {name: tensor.float() for name, tensor in state.items()})
        assert convert("to-hf", "--source", trained, "--target", tmp_path / "32", "--dtype", "fp32").code == 0
        assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "32/model.safetensors").values())
    with subtests.test("a tensor is missing"):
        trained = saved(target, tmp_path / "missing", {name: state[name] for name in state.keys() - {key}})
        answer = convert("to-hf", "--source", trained, "--target", tmp_path / "no")
        assert answer.code == 2
        assert f"{key} is missing" in answer.err
    with subtests.test("a tensor is unknown"):
        trained = saved(target, tmp_path / "unknown", state | {"layers.0.adapter.weight": torch.ones(2)})
        answer = convert("to-hf", "--source", trained, "--target", tmp_path / "no")
        assert answer.code == 2
        assert "layers.0.adapter.weight is unknown" in answer.err


def test_a_description_of_another_model_is_found_out(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    source, target = write_architecture(tmp_path / "hf", registry.sizes()["tiny"]), tmp_path / "te"
    assert convert("to-te", "--source", source, "--target", target).code == 0
    made = saved(target, tmp_path / "made", load_file(target / "model.safetensors"))
    right = json.loads((made / "layers.json").read_text())
    earlier = json.loads((GOLDEN / "architecture" / "version_1.json").read_text())["tiny"]
    arguments = right["layers"][1]["arguments"] | {"rotary_pos_interleaved": True}
    for changes, code in (
        ({"architecture": earlier}, 0),  # as earlier versions wrote it
        ({"architecture": earlier | {"rope_theta": 5.0}}, 1),
        ({"architecture": {}}, 1),
        ({"layers": [right["layers"][0], right["layers"][1] | {"arguments": arguments}]}, 1),
    ):
        (made / "layers.json").write_text(json.dumps(right | changes))
        answer = convert("verify", "--source", source, "--target", made)
        assert answer.code == code, answer.err
        assert ("layers.json does not describe this model" in answer.err) == bool(code)


def test_in_parts_and_by_threads_it_is_the_same(
    write_architecture: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.checkpoint.formats import hugging_face as hf

    monkeypatch.setattr(hf.default_layout, "__defaults__", (100_000, None))  # bytes of a shard: several files
    source = write_architecture(tmp_path / "hf", registry.sizes()["mixtral-tiny"], shard_bytes=100_000)
    words = ("to-te", "--source", source)
    assert convert(*words, "--target", tmp_path / "te", "--workers", "1").code == 0
    for part in ("1/2", "2/2", "publish/2"):
        assert convert(*words, "--target", tmp_path / "parts", "--workers", "3", "--shard", part).code == 0
    files = [file for file in (tmp_path / "te").rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert sum(file.name.startswith("model-") for file in files) > 3
    for file in files:
        assert (tmp_path / "parts" / file.relative_to(tmp_path / "te")).read_bytes() == file.read_bytes(), file
    assert convert("to-hf", "--source", tmp_path / "parts", "--target", tmp_path / "back").code == 0
    for file in source.glob("model*"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file


@pytest.mark.gpu
@pytest.mark.parametrize("size", WHOLE)
def test_transformer_engine_itself_loads_and_computes_the_same(
    size: str, write_architecture: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    engine = pytest.importorskip("transformer_engine.pytorch", reason="needs transformer_engine")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")  # which, as the fused kernels, knows no fp32
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    source = write_architecture(tmp_path / "hf", TINY[size], dtype="fp32")
    assert convert("to-te", "--source", source, "--target", tmp_path / "te").code == 0
    plain = MODEL.Model(tmp_path / "te", ENGINE.TransformerLayer)(some_ids())
    model = MODEL.Model(tmp_path / "te", lambda **given: engine.TransformerLayer(**given, params_dtype=torch.float32))
    model.state = {name: tensor.cuda() for name, tensor in model.state.items()}
    made = model.eval()(some_ids().cuda()).cpu()
    # TransformerEngine multiplies fp32 matrices in TF32: 2^-11 each, adding up over two layers.
    assert (made - plain).abs().max() < 0.05 * plain.std()
