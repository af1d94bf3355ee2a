"""Per-rank checkpoints, written as by every Megatron-LM version, are exported as the original Hugging Face source.

The shards are cut by torch's `chunk`, `view` and `permute`, as in Megatron-LM's checkpoint tools. Megatron-Core's state dicts
are in test_every_family.py.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.architecture.architecture import Architecture, Attention
from shared.families import registry

Make = Callable[..., Path]
LLAMA = registry.sizes()["tiny"].with_values(vocab_size=259, num_layers=4)
GPT2 = registry.sizes()["gpt2-tiny"].with_values(vocab_size=259, num_layers=4)
QWEN2 = registry.sizes()["qwen2-tiny"].with_values(vocab_size=259, num_layers=4)
MIXTRAL = registry.sizes()["mixtral-tiny"].with_values(num_layers=4)


def layer_of(a: Architecture, hf: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """One layer whole, under Megatron-Core's names."""
    if a.family == "gpt2":
        p = f"transformer.h.{layer}."
        names = {"linear_proj": "attn.c_proj", "linear_fc1": "mlp.c_fc", "linear_fc2": "mlp.c_proj"}
        made = {}
        for kind in ("weight", "bias"):
            for key, name in names.items():
                tensor = hf[f"{p}{name}.{kind}"]
                place = "self_attention" if key == "linear_proj" else "mlp"
                made[f"{place}.{key}.{kind}"] = tensor.T.contiguous() if kind == "weight" else tensor
            made[f"self_attention.linear_qkv.layer_norm_{kind}"] = hf[f"{p}ln_1.{kind}"]
            made[f"mlp.linear_fc1.layer_norm_{kind}"] = hf[f"{p}ln_2.{kind}"]
            qkv = hf[f"{p}attn.c_attn.{kind}"]
            qkv = qkv.T if kind == "weight" else qkv  # [3 * heads * head_dim, ...]
            blocks = qkv.reshape(3, a.attention.heads, a.attention.head_dim, *qkv.shape[1:])
            made[f"self_attention.linear_qkv.{kind}"] = blocks.transpose(0, 1).reshape(qkv.shape)
        return made
    p, n = f"model.layers.{layer}.", a.attention.groups
    made = {
        "self_attention.linear_qkv.layer_norm_weight": hf[p + "input_layernorm.weight"],
        "self_attention.linear_proj.weight": hf[p + "self_attn.o_proj.weight"],
    }
    for kind in ("weight", "bias") if isinstance(a.attention, Attention) and a.attention.bias else ("weight",):
        q, k, v = (hf[f"{p}self_attn.{part}_proj.{kind}"] for part in "qkv")
        rows = [part.reshape(n, -1, *part.shape[1:]) for part in (q, k, v)]
        made[f"self_attention.linear_qkv.{kind}"] = torch.cat(rows, 1).flatten(0, 1)
    if a.moe:
        made["pre_mlp_layernorm.weight"] = hf[p + "post_attention_layernorm.weight"]
        made["mlp.router.weight"] = hf[p + "block_sparse_moe.gate.weight"]
        for expert in range(a.moe.experts):
            e = f"{p}block_sparse_moe.experts.{expert}."
            own = f"mlp.experts.local_experts.{expert}."
            made[own + "linear_fc1.weight"] = torch.cat([hf[e + "w1.weight"], hf[e + "w3.weight"]])
            made[own + "linear_fc2.weight"] = hf[e + "w2.weight"]
        return made
    made["mlp.linear_fc1.layer_norm_weight"] = hf[p + "post_attention_layernorm.weight"]
    made["mlp.linear_fc1.weight"] = torch.cat([hf[p + "mlp.gate_proj.weight"], hf[p + "mlp.up_proj.weight"]])
    made["mlp.linear_fc2.weight"] = hf[p + "mlp.down_proj.weight"]
    return made


def shard(a: Architecture, key: str, tensor: torch.Tensor, rank: int, count: int, version: float) -> torch.Tensor:
    """A tensor-parallel rank's part."""
    if "layer_norm" in key or "layernorm" in key or "router" in key or key.endswith(("proj.bias", "fc2.bias")):
        return tensor
    if "linear_fc1" in key and a.feed_forward.gated:
        return torch.cat([half.chunk(count)[rank] for half in tensor.chunk(2)])
    if "linear_proj" in key or "linear_fc2" in key:
        return tensor.chunk(count, dim=1)[rank]
    part = tensor.chunk(count)[rank]
    if "linear_qkv" in key and version < 2:  # [heads, 3, head_dim] is what later versions have
        heads = part.view(-1, 3, a.attention.head_dim, *part.shape[1:])
        order = (1, 0, 2, *range(3, heads.dim())) if version < 1 else (0, 2, 1, *range(3, heads.dim()))
        part = heads.permute(*order).reshape(part.shape)
    return part


OLD = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
OLDEST = OLD | {
    "self_attention.linear_qkv.": "attention.query_key_value.",
    "self_attention.linear_proj.": "attention.dense.",
}


def renamed(key: str, names: dict[str, str]) -> str:
    found = next((old for old in names if key.startswith(old)), None)
    return key if found is None else names[found] + key.removeprefix(found)


def nested(state: dict[str, torch.Tensor], root: str) -> dict[str, Any]:
    """A state dict of Megatron-LM's own model: dicts within dicts down to the transformer's."""
    parts: dict[str, Any] = {}
    for key, tensor in state.items():
        if key.startswith("decoder."):
            name = key.removeprefix("decoder.")
            parts.setdefault(root, {})[name] = tensor
        else:
            module, name, kind = ("output_layer", "", "weight") if key.startswith("output") else key.split(".")
            at = parts.setdefault(module, {})
            (at.setdefault(name, {}) if name else at)[kind] = tensor
    head = (
        {"word_embeddings_for_head": parts.pop("output_layer")}
        if "output_layer" in parts and root == "transformer"
        else {}
    )
    return {"language_model": parts, **head}


def write(
    folder: Path,
    a: Architecture,
    source: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    expert: int = 1,
    version: float = 3.0,
    names: str = "core",
    iteration: str = "iter_0000007",
    **arguments: Any,
) -> Path:
    """Every rank's file."""
    hf = load_file(source / "model.safetensors")
    gpt2 = a.family == "gpt2"
    embedding = hf["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"]
    padding = torch.zeros(-len(embedding) % (128 * tensor), a.hidden_size, dtype=embedding.dtype)
    per_stage = a.num_layers // (pipeline * virtual)
    told = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "num_attention_heads": a.attention.heads,
        **arguments,
    }
    for t, p, e in ((t, p, e) for t in range(tensor) for p in range(pipeline) for e in range(expert)):
        chunks = []
        for v in range(virtual):
            first, last = (v, p) == (0, 0), (v, p) == (virtual - 1, pipeline - 1)
            state = {}
            if first:
                state["embedding.word_embeddings.weight"] = torch.cat([embedding, padding]).chunk(tensor)[t]
                if gpt2:
                    state["embedding.position_embeddings.weight"] = hf["transformer.wpe.weight"]
            for local in range(per_stage):
                for key, whole in layer_of(a, hf, (v * pipeline + p) * per_stage + local).items():
                    kept = renamed(key, {"core": {}, "old": OLD, "oldest": OLDEST}[names])
                    if a.moe and "local_experts" in key:
                        own = a.moe.experts // expert
                        index = int(key.split(".")[3])
                        if index // own != e:
                            continue
                        kept = key.replace(f"local_experts.{index}.", f"local_experts.{index % own}.")
                    state[f"decoder.layers.{local}.{kept}"] = shard(a, key, whole, t, tensor, version).clone()
            if last:
                for kind in ("weight", "bias") if gpt2 else ("weight",):
                    state[f"decoder.final_layernorm.{kind}"] = hf[
                        f"transformer.ln_f.{kind}" if gpt2 else "model.norm.weight"
                    ]
                if not a.head.tied or pipeline > 1:
                    head = embedding if a.head.tied else hf["lm_head.weight"]
                    state["output_layer.weight"] = torch.cat([head, padding]).chunk(tensor)[t].clone()
            roots = {"old": "encoder", "oldest": "transformer"}
            chunks.append(nested(state, roots[names]) if names != "core" else state)
        keys = ["model"] if virtual == 1 else [f"model{v}" for v in range(virtual)]
        parts = [f"{t:02d}"] + [f"{rank:03d}" for rank, size in ((p, pipeline), (e, expert)) if size > 1]
        rank = folder / iteration / "_".join(["mp_rank", *parts])
        rank.mkdir(parents=True)
        content = {"args": argparse.Namespace(**told), "iteration": 7, **dict(zip(keys, chunks, strict=True))}
        torch.save(content | ({"checkpoint_version": version} if version else {}), rank / "model_optim_rng.pt")
    tracker = iteration if iteration == "release" else str(int(iteration.removeprefix("iter_")))
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "tp2-pp2": (LLAMA, {"tensor": 2, "pipeline": 2}),
    "tp2-pp2-vp2": (LLAMA, {"tensor": 2, "pipeline": 2, "virtual": 2}),
    "old-tp2-pp2": (LLAMA, {"tensor": 2, "pipeline": 2, "names": "old"}),
    "tied-old-pp4": (QWEN2, {"pipeline": 4, "names": "old"}),
    "tied-oldest-tp2-pp2": (QWEN2, {"tensor": 2, "pipeline": 2, "names": "oldest"}),
    "one-file-release": (QWEN2, {"iteration": "release"}),
    "gpt2-version-0": (GPT2, {"tensor": 2, "pipeline": 2, "names": "oldest", "version": 0}),
    "gpt2-version-1": (GPT2, {"tensor": 2, "names": "oldest", "version": 1.0}),
    "gpt2-version-2": (GPT2, {"tensor": 4, "names": "old", "version": 2.0}),
    "experts-tp2-ep2": (MIXTRAL, {"tensor": 2, "expert": 2}),
    "experts-pp2-ep4": (MIXTRAL, {"pipeline": 2, "expert": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_megatron_lm_saved_is_the_source(
    write_architecture: Make, convert: Any, tmp_path: Path, case: str
) -> None:
    architecture, options = CASES[case]
    source = write_architecture(tmp_path / "hf", architecture)
    saved = write(tmp_path / "saved", architecture, source, **options)
    answer = convert("to-hf", "--source", saved, "--hf-files", source, "--target", tmp_path / "back")
    assert answer.code == 0, answer.err
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    answer = convert("to-megatron", "--source", tmp_path / "back", "--target", tmp_path / "megatron")
    assert answer.code == 0, answer.err


@pytest.fixture
def source(write_architecture: Make, tmp_path: Path) -> Path:
    return write_architecture(tmp_path / "hf", LLAMA)


@pytest.fixture
def saved(source: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "saved", LLAMA, source, tensor=2, pipeline=2)


def ranks(saved: Path) -> Iterator[Path]:
    yield from sorted(saved.glob("*/*/model_optim_rng.pt"))


def change(path: Path, **changes: Any) -> None:
    torch.save(torch.load(path, weights_only=False) | changes, path)


class Harmful:
    """Would make a file if it were run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def missing_rank(saved: Path) -> None:
    path = list(ranks(saved))[2]
    path.unlink()


def missing_stage(saved: Path) -> None:
    for path in list(ranks(saved)):
        if path.parent.name.endswith("_001"):
            path.unlink()


def other_iteration(saved: Path) -> None:
    change(list(ranks(saved))[1], iteration=8)


def cut_short(saved: Path) -> None:
    path = list(ranks(saved))[3]
    path.write_bytes(path.read_bytes()[:-500])


def harmful(saved: Path) -> None:
    path = next(ranks(saved))
    torch.save({"model": {}, "args": Harmful(saved / "ran")}, path, pickle_protocol=pickle.DEFAULT_PROTOCOL)


def other_heads(saved: Path) -> None:
    for path in ranks(saved):
        change(
            path,
            args=argparse.Namespace(
                tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_attention_heads=8
            ),
        )


def another_version(saved: Path) -> None:
    for path in ranks(saved):
        change(path, checkpoint_version=4.0)


def no_model(saved: Path) -> None:
    path = next(ranks(saved))
    state = torch.load(path, weights_only=False)
    torch.save({"args": state["args"], "iteration": 7}, path)


def surplus_tensor(saved: Path) -> None:
    for path in ranks(saved):
        state = torch.load(path, weights_only=False)
        change(path, model=state["model"] | {"decoder.layers.0.self_attention.linear_qkv.bias": torch.zeros(64)})


def one_layer_less(saved: Path) -> None:
    for path in ranks(saved):
        state = torch.load(path, weights_only=False)
        kept = {name: tensor for name, tensor in state["model"].items() if "layers.1.mlp.linear_fc2" not in name}
        change(path, model=kept)


BROKEN: dict[Callable[[Path], None], str] = {
    missing_rank: "mp_rank_01_000 is missing: the checkpoint is tensor x pipeline x expert parallel 2 x 2 x 1",
    missing_stage: "mp_rank_00_001 is missing",
    other_iteration: "iteration is 8, in",
    cut_short: "is truncated",
    harmful: "it was not executed",
    other_heads: "num_attention_heads of the run is 8, config.json says 4",
    another_version: "checkpoint_version is 4.0",
    no_model: "has no `model`",
    surplus_tensor: "linear_qkv.bias is unknown to this family and would be lost",
    one_layer_less: "linear_fc2.weight is in 2 of 3 layers",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_what_is_not_whole_is_refused_in_one_line(
    source: Path, saved: Path, convert: Any, tmp_path: Path, broken: Callable[[Path], None]
) -> None:
    broken(saved)
    answer = convert("to-hf", "--source", saved, "--hf-files", source, "--target", tmp_path / "back")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert BROKEN[broken] in answer.err
    assert not (tmp_path / "back").exists()
    assert not (saved / "ran").exists()


def test_a_tied_head_that_differs_is_refused(write_architecture: Make, convert: Any, tmp_path: Path) -> None:
    source = write_architecture(tmp_path / "hf", QWEN2)
    saved = write(tmp_path / "saved", QWEN2, source, pipeline=2)
    path = list(ranks(saved))[-1]
    state = torch.load(path, weights_only=False)["model"]
    change(path, model=state | {"output_layer.weight": state["output_layer.weight"] + 1})
    answer = convert("to-hf", "--source", saved, "--hf-files", source, "--target", tmp_path / "back")
    assert answer.code == 2
    assert "output_layer.weight differs from embedding.word_embeddings.weight" in answer.err
    assert not (tmp_path / "back").exists()


def test_who_cannot_read_it_says_who_can(saved: Path, convert: Any) -> None:
    answer = convert("inspect", saved)
    assert answer.code == 2
    assert "`convert to-hf --hf-files DIR` reads it" in answer.err


def test_the_source_s_own_files_are_asked_for(saved: Path, convert: Any, tmp_path: Path) -> None:
    answer = convert("to-hf", "--source", saved, "--target", tmp_path / "back")
    assert answer.code == 2
    assert "--hf-files" in answer.err
