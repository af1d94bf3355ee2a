"""Required content of the Hugging Face directory, and content of the Megatron directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.checkpoint.formats.hugging_face import HfReader, default_layout, write_weights
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.families import registry

Make = Callable[..., Path]


def rewrite(directory: Path, change: Callable[[dict[str, tuple[str, tuple[int, ...], bytes]]], None]) -> None:
    """Write a single-file checkpoint's weights again after a change of {name: (dtype, shape, bytes)}."""
    reader = HfReader(directory)
    tensors = {n: (t.dtype, t.shape, b"".join(map(bytes, reader.rows(n)))) for n, t in reader.tensors.items()}
    change(tensors)
    (directory / "model.safetensors").unlink()
    layout = default_layout([(n, d, s) for n, (d, s, _) in tensors.items()])
    write_weights(directory, layout, lambda t: [memoryview(tensors[t.name][2])], lambda name, digest: None)


def refused(convert: Any, source: Path, target: Path) -> str:
    answer = convert("to-megatron", "--source", source, "--target", target)
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1 + answer.err.count("to-megatron: llama"), answer.err
    assert not target.exists()
    assert not list(target.parent.glob("*.partial-*"))
    return str(answer.err)


def test_result_holds_all_that_travels(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    assert convert("to-megatron", "--source", make_hf(), "--target", target).code == 0
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert {p.name for p in (target / "release").iterdir()} == {
        *("__0_0.distcp", ".metadata", "metadata.json", "common.pt")
    }
    kept = {p.relative_to(target / "hf").as_posix() for p in (target / "hf").rglob("*") if p.is_file()}
    assert kept == {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "extra/note.txt"),
        "weights.json",
    }
    facts = json.loads((target / "manifest.json").read_text())["facts"]
    assert (facts["family"], facts["dtype"], facts["architecture"]["layers"][0]["mixer"]["head_dim"]) == (
        "llama",
        ["bfloat16"],
        16,
    )


def test_torch_files_give_the_same_as_safetensors(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    plain = make_hf()
    pickled = tmp_path / "pickled"
    shutil.copytree(plain, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(load_file(plain / "model.safetensors"), pickled / "pytorch_model.bin")
    for name, source in (("a", plain), ("b", pickled)):
        assert convert("to-megatron", "--source", source, "--target", tmp_path / name).code == 0
    weights = [(tmp_path / name / "release" / "__0_0.distcp").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    certificate = ("--certificate", tmp_path / "certificate.json", "--no-logits")
    assert convert("verify", "--source", pickled, "--target", tmp_path / "b", *certificate).code == 0
    assert convert("to-hf", "--source", tmp_path / "b", "--target", tmp_path / "back").code == 0
    assert {n: t.tolist() for n, t in load_file(tmp_path / "back" / "model.safetensors").items()} == {
        n: t.tolist() for n, t in load_file(plain / "model.safetensors").items()
    }
    assert not list((tmp_path / "back").glob("*.bin"))


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.proof)!r}, 'w').close()",))


def test_code_in_torch_files_is_refused_and_not_run(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source, proof = make_hf(), tmp_path / "proof"
    torch.save(load_file(source / "model.safetensors") | {"more": Runs(proof)}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(convert, source, tmp_path / "m")
    for words in (("inspect", source), ("verify", "--source", source, "--target", source)):
        assert convert(*words).code == 2
    assert not proof.exists()


def test_each_tensor_keeps_its_type(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    """fp32, fp16 and bf16 in one file, and within one of Megatron-Core's tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    source, target, back = make_hf(), tmp_path / "m", tmp_path / "back"
    tensors = load_file(source / "model.safetensors")
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    mixed = {name: tensor.to(kinds[place % 3]) for place, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    held = {tensor.dtype.name for tensor in TorchDistReader(target / "release").tensors.values()}
    assert held > {"float32"}
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_what_is_not_finite_comes_back_and_is_reported(
    make_hf: Make, convert: Any, overwrite_tensor: Any, tmp_path: Path
) -> None:
    """A conversion copies it as it is; whoever looks at each number says so."""

    def spoil(bits: np.ndarray) -> np.ndarray:
        spoilt = bits.copy()
        spoilt[0, :3] = [0x7F80, 0xFF80, 0xFFA5]  # both infinities, a NaN with a payload
        return spoilt

    source, target, back = make_hf(), tmp_path / "m", tmp_path / "back"
    name = "model.layers.0.mlp.gate_proj.weight"
    overwrite_tensor(source / "model.safetensors", name, spoil)
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    for directory in (source, target):
        answer = convert("inspect", directory, "--scan")
        assert (answer.code, "1 NaN, 2 infinite" in answer.err) == (1, True)
    assert (
        f"not finite on both sides: {name}"
        in convert("verify", "--source", source, "--target", target, "--no-logits").err
    )
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_same_command_again_says_it_is_done(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    words = ("to-megatron", "--source", make_hf(), "--target", tmp_path / "megatron")
    assert convert(*words).code == 0
    answer = convert(*words)
    assert answer.code == 0
    assert "already done" in answer.err


def test_extra_state_of_every_module_that_transformer_engine_has(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    convert("to-megatron", "--source", make_hf("qwen3"), "--target", tmp_path / "megatron")
    objects = TorchDistReader(tmp_path / "megatron" / "release").objects
    for layer in range(2):
        for module in ("self_attention.linear_qkv", "self_attention.q_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"):
            assert f"decoder.layers.{module}._extra_state/shard_{layer}_2" in objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects


def test_one_tensor_missing(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    rewrite(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refused(convert, source, tmp_path / "m")


def test_lm_head_missing_though_untied(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in refused(convert, source, tmp_path / "m")


def test_one_tensor_too_many(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    name = "model.layers.0.mlp.gate_proj.bias"
    rewrite(source, lambda tensors: tensors.update({name: ("BF16", (160,), bytes(320))}))
    message = refused(convert, source, tmp_path / "m")
    assert f"{name} is unknown" in message
    assert "model.safetensors" in message


def test_one_tensor_of_another_shape(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source, name = make_hf(), "model.layers.0.self_attn.k_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: ("BF16", (16, 128), tensors[name][2])}))
    message = refused(convert, source, tmp_path / "m")
    assert name in message
    assert "[16, 128]" in message
    assert "[32, 64]" in message


def test_quantised_weights(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source, name = make_hf(), "model.layers.0.self_attn.k_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: ("F8_E4M3", (32, 64), bytes(32 * 64))}))
    assert "F8_E4M3" in refused(convert, source, tmp_path / "m")


def test_stored_head_that_differs_from_the_embedding_it_is_tied_to(
    make_hf: Make, convert: Any, tmp_path: Path, overwrite_tensor: Any
) -> None:
    source = make_hf("llama-tied-head-stored")

    def flip(bits: np.ndarray) -> np.ndarray:
        changed = bits.copy()
        changed[-1, -1] ^= 1
        return changed

    overwrite_tensor(source / "model.safetensors", "lm_head.weight", flip)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(convert, source, tmp_path / "m")


def test_missing_shard(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf("llama-rope-llama3-sharded")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"{gone} is missing" in refused(convert, source, tmp_path / "m")


def test_shard_and_its_lines_of_the_index_missing(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    """A self-consistent index of a part of the model."""
    source = make_hf("llama-rope-llama3-sharded")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = sorted(source.glob("*.safetensors"))[-1]
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f != last.name}
    index.write_text(json.dumps(content))
    assert f"{last} is not in model.safetensors.index.json" in refused(convert, source, tmp_path / "m")
    last.unlink()
    assert "missing, though config.json asks for it" in refused(convert, source, tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "the nearest is llama"),
        ({"model_type": None, "architectures": None}, "model_type is missing"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"num_key_value_heads": 3}, "4 attention heads are not divisible by 3 key/value heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; a positive number is required"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 100000 layers are supported"),
        ({"architectures": "LlamaForCausalLM"}, "a list of one class is required"),
    ],
)
def test_configuration_that_is_not_understood(
    make_hf: Make, convert: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = make_hf()
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    assert words in refused(convert, source, tmp_path / "m")


def test_ignored_weights_are_named_and_recorded(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"x")
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "m")
    assert answer.code == 0
    assert "weights are read from model.safetensors; ignored: original/" in answer.err
    assert json.loads((tmp_path / "m/manifest.json").read_text())["facts"]["ignored"] == ["original/"]


@pytest.mark.parametrize("name", ["weights.json", "asides.safetensors"])
def test_a_file_that_would_be_taken_for_this_tools_is_refused(
    make_hf: Make, convert: Any, tmp_path: Path, name: str
) -> None:
    source = make_hf()
    (source / name).write_text("mine")
    assert f"{name}: the name is reserved for a file that to-megatron writes" in refused(
        convert, source, tmp_path / "m"
    )


def test_links_of_a_download_cache_are_followed(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert convert("to-megatron", "--source", snapshot, "--target", tmp_path / "m").code == 0
    assert (tmp_path / "m" / "hf" / "extra" / "note.txt").read_bytes() == bytes(range(256))
    assert not (tmp_path / "m" / "hf" / "tokenizer.json").is_symlink()


def test_numbers_that_cannot_be_held_less_one_are_refused(
    write_architecture: Any, overwrite_tensor: Any, convert: Any, tmp_path: Path
) -> None:
    """Megatron-Core adds one to every norm's weight where it does so to one's; too small a number would be lost."""
    source = write_architecture(tmp_path / "hf", registry.sizes()["qwen3-next-tiny"])
    words = ("to-megatron", "--source", source, "--target", tmp_path / "m")
    name = "model.layers.0.linear_attn.norm.weight"

    def small(bits: Any) -> Any:
        return np.concatenate([np.array([0x2000], bits.dtype), bits[1:]])  # 1e-19

    overwrite_tensor(source / "model.safetensors", name, small)
    answer = convert(*words)
    assert answer.code == 2
    assert f"{name} has values too small for a bit-exact round trip through zero-centred gamma" in answer.err
    assert not (tmp_path / "m").exists()


def test_facts_that_only_the_tokenizer_has(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    """GLM-10B's configuration does not say which tokens its positions and mask follow from."""
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_architecture(source, registry.sizes()["glm-10b-tiny"])
    config = json.loads((source / "config.json").read_text())
    fields = {"sop_token_id": "<|startofpiece|>", "mask_token_id": "[MASK]"}
    fields |= {"smask_token_id": "[sMASK]", "gmask_token_id": "[gMASK]"}
    tokens = {name: config.pop(field) for field, name in fields.items()}
    (source / "config.json").write_text(json.dumps(config))
    answer = convert("to-megatron", "--source", source, "--target", target)
    assert answer.code == 2
    assert "put the published tokenizer's files there" in answer.err
    assert not target.exists()
    (source / "added_tokens.json").write_text(json.dumps(tokens))
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    held = json.loads((target / "manifest.json").read_text())["facts"]["architecture"]["prefix"]
    assert (held["start_token"], held["blank_tokens"]) == (7, [3, 5, 4])
    assert "problem" not in json.loads(convert("inspect", target, "--json").out)
    assert convert("to-te", "--source", source, "--target", tmp_path / "te").code == 0
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    for name in ("config.json", "added_tokens.json", "model.safetensors"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_empty_tensors_of_zero3_are_named_the_same_each_time(make_hf: Make, tmp_path: Path) -> None:
    """Sets of names have another order in every process."""
    source = make_hf()

    def empty(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
        tensors |= {name: (tensors[name][0], (0,), b"") for name in tensors if "norm" not in name}

    rewrite(source, empty)
    command = [sys.executable, "-m", "tools.convert.cli", "to-megatron", "--source", source, "--target", tmp_path / "m"]
    lines = set()
    for seed in range(4):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        lines.add(done.stderr)
    (line,) = lines
    assert "are empty, as ZeRO-3 and FSDP save weights that are not gathered" in line
    assert line.count("\n") == 1
