"""SwissArmyTransformer rank files, as of GLM-130B's `convert_tp.py`, are read as the model before sharding.

The shards are cut by torch's `chunk`, as in that program.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.families import registry

Make = Callable[..., Path]
TINY = registry.sizes()["glm-130b-tiny"]
SAME = ("layernorm.weight", "layernorm.bias", "dense.bias", "dense_4h_to_h.bias", "inv_freq")


def part(name: str, whole: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """A rank's part of a tensor."""
    if name.endswith(SAME):
        return whole
    if "dense_h_to_4h" in name:
        chunks = whole.chunk(2 * count)
        return torch.cat([chunks[rank], chunks[count + rank]])
    across = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
    return whole.chunk(count, dim=1 if across else 0)[rank].clone()


def cut(folder: Path, model: dict[str, torch.Tensor], count: int, **beside: Any) -> Path:
    """A checkpoint of `count` ranks."""
    (folder / "49300").mkdir(parents=True)
    (folder / "latest").write_text("49300")
    for rank in range(count):
        module = {name: part(name, whole, rank, count) for name, whole in model.items()}
        torch.save({"module": module, **beside}, folder / "49300" / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def weights(megatron: Path) -> dict[str, bytes]:
    """Every file of a directory but those that name where it came from."""
    files = (
        path for path in megatron.rglob("*") if path.is_file() and path.name not in ("manifest.json", "config.json")
    )
    return {path.relative_to(megatron).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def model(write_architecture: Make, tmp_path: Path) -> dict[str, torch.Tensor]:
    """A whole model's tensors, constants of the rotation among them."""
    found = load_file(write_architecture(tmp_path / "hf", TINY, dtype="fp16") / "model.safetensors")
    for layer in range(TINY.num_layers):
        constants = 10_000.0 ** (-torch.arange(0, TINY.attention.head_dim, 2) / TINY.attention.head_dim)
        found[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = constants.half()
    return found


@pytest.fixture
def joined(model: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The directory that the ranks make up."""
    (tmp_path / "joined").mkdir()
    save_file(model, tmp_path / "joined" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "joined" / "config.json").write_text(json.dumps(registry.to_config(TINY)))
    return tmp_path / "joined"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("command", ["to-megatron", "to-te"])
def test_ranks_are_the_joined_model(
    model: dict[str, torch.Tensor], joined: Path, convert: Any, tmp_path: Path, count: int, command: str
) -> None:
    source = cut(tmp_path / "sat", dict(sorted(model.items())), count)
    for directory, target in ((joined, "wanted"), (source, "made")):
        answer = convert(command, "--source", directory, "--target", tmp_path / target)
        assert answer.code == 0, answer.err
    assert "config.json: of glm-130b-tiny, which has the shapes of" in answer.err
    wanted, made = weights(tmp_path / "wanted"), weights(tmp_path / "made")
    assert wanted.keys() == made.keys()
    assert len([name for name, content in wanted.items() if len(content) > 1000]) > 1
    layouts = [json.loads(found.pop("hf/weights.json")) for found in (wanted, made)]
    assert [s["file"] for s in layouts[0]["shards"]] == [s["file"] for s in layouts[1]["shards"]]
    assert wanted == made
    answer = convert("verify", "--source", source, "--target", tmp_path / "made", "--no-logits")
    assert answer.code == 0, answer.err
    answer = convert("to-hf", "--source", tmp_path / "made", "--target", tmp_path / "back")
    assert answer.code == 0, answer.err
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == model.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == registry.to_config(TINY)
    assert not (tmp_path / "back" / "latest").exists()


def test_what_training_leaves_beside_changes_nothing(
    model: dict[str, torch.Tensor], convert: Any, tmp_path: Path
) -> None:
    """DeepSpeed's checkpoints of SwissArmyTransformer: states of generators, and its own constants."""
    model = {name: tensor for name, tensor in model.items() if not name.endswith("inv_freq")}
    model["mixins.rotary-embedding.rotary_emb.inv_freq"] = torch.ones(TINY.attention.head_dim // 2)
    states = {
        "iteration": 49300,
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # as that program does
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": None,
    }
    source = cut(tmp_path / "sat", model, 2, **states)
    (source / "model_config.json").write_text(
        json.dumps({"model_class": "GLM130B", "num_layers": TINY.num_layers, "model_parallel_size": 2})
    )
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert answer.code == 0, answer.err
    assert (tmp_path / "megatron" / "hf" / "model_config.json").is_file()
    answer = convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back")
    assert answer.code == 0, answer.err
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in model.items())


def test_a_model_of_no_published_shape_needs_its_configuration(
    write_architecture: Make, convert: Any, tmp_path: Path
) -> None:
    other = TINY.with_values(
        num_layers=3,
        residual={"input_multiplier": 6**0.5},
        vocab_size=96,
        attention={"heads": 2, "groups": 2, "head_dim": TINY.hidden_size // 2},
    )
    files = write_architecture(tmp_path / "hf", other, dtype="fp16")
    source = cut(tmp_path / "sat", load_file(files / "model.safetensors"), 2)
    words = ("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    answer = convert(*words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "no published model has its shapes (num_layers 3, " in answer.err
    assert "--hf-files DIR" in answer.err
    (files / "model.safetensors").rename(tmp_path / "model.safetensors")
    answer = convert(*words, "--hf-files", files)
    assert answer.code == 0, answer.err
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").is_file()
    verify = ("verify", "--source", source, "--target", tmp_path / "megatron", "--no-logits", "--hf-files", files)
    answer = convert(*verify)
    assert answer.code == 0, answer.err
    assert convert("to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def rank(source: Path, number: int) -> Path:
    return source / "49300" / f"mp_rank_{number:02d}_model_states.pt"


def change(path: Path, name: str, made: Callable[[torch.Tensor], torch.Tensor | None], old: bool = False) -> None:
    module = torch.load(path)["module"]
    tensor = made(module.pop(name, torch.zeros(4)))
    module |= {} if tensor is None else {name: tensor}
    torch.save({"module": module}, path, _use_new_zipfile_serialization=not old)


QKV = "transformer.layers.1.attention.query_key_value.weight"


def cut_short(source: Path) -> None:
    rank(source, 2).write_bytes(rank(source, 2).read_bytes()[:-500])


def settings(source: Path, **told: Any) -> None:
    (source / "model_config.json").write_text(json.dumps(told))


def of_all_ranks(source: Path, name: str, made: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    for number in range(4):
        change(rank(source, number), name, made)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first rank": (
        lambda s: rank(s, 0).unlink(),
        "mp_rank_00_model_states.pt is missing: the checkpoint has 4 tensor-parallel ranks",
    ),
    "middle rank": (lambda s: rank(s, 2).unlink(), "mp_rank_02_model_states.pt is missing"),
    "last rank": (lambda s: rank(s, 3).unlink(), "mp_rank_03_model_states.pt is missing"),
    "truncated": (cut_short, "mp_rank_02_model_states.pt is truncated"),
    "old torch": (lambda s: change(rank(s, 1), QKV, lambda t: t, old=True), "has the format of torch before 1.6"),
    "mixed shapes": (
        lambda s: change(rank(s, 1), QKV, lambda t: t[:-1]),
        f"mp_rank_01_model_states.pt: {QKV} is F16[47",
    ),
    "mixed types": (
        lambda s: change(rank(s, 1), QKV, lambda t: t.float()),
        f"mp_rank_01_model_states.pt: {QKV} is F32[",
    ),
    "tensor of one rank": (
        lambda s: change(rank(s, 3), "new", lambda t: t),
        "mp_rank_03_model_states.pt holds new and",
    ),
    "unknown tensor": (
        lambda s: of_all_ranks(s, "new", lambda t: t),
        "new is unknown to this family and would be lost",
    ),
    "missing tensor": (lambda s: of_all_ranks(s, QKV, lambda t: None), f"{QKV} is missing"),
    "other shape": (
        lambda s: of_all_ranks(s, QKV, lambda t: t[:-3]),
        f"{QKV} is [180, 64], config.json asks for [192, 64]",
    ),
    "quantised": (lambda s: of_all_ranks(s, QKV, lambda t: t.to(torch.int8)), f"{QKV} is quantised (I8)"),
    "other heads": (
        lambda s: of_all_ranks(s, "transformer.layers.1.attention.rotary_emb.inv_freq", lambda t: t[:4]),
        "num_attention_heads is 4, inv_freq in the rank files implies 8",
    ),
    "other settings": (lambda s: settings(s, max_sequence_length=7), "max_sequence_length is 7, in "),
    "unknown settings": (lambda s: settings(s, position_encoding_2d=True), "position_encoding_2d"),
    "no module": (lambda s: torch.save({"model": {}}, rank(s, 0)), "has no tensors under `module`"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_whole_is_refused_in_one_line(
    model: dict[str, torch.Tensor], convert: Any, tmp_path: Path, broken: str
) -> None:
    source = cut(tmp_path / "sat", model, 4)
    BROKEN[broken][0](source)
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert answer.code == 2, answer.err
    assert BROKEN[broken][1] in answer.err.splitlines()[-1]
    told = [line for line in answer.err.splitlines()[:-1] if not line.startswith("config.json: of glm-130b")]
    assert not told
    assert not list(tmp_path.glob("megatron*"))


def test_who_cannot_read_ranks_says_who_can(model: dict[str, torch.Tensor], convert: Any, tmp_path: Path) -> None:
    answer = convert("inspect", cut(tmp_path / "sat", model, 2))
    assert answer.code == 2
    assert "is a SwissArmyTransformer checkpoint, one file per rank; `convert to-megatron` reads it" in answer.err


def test_a_source_with_a_configuration_takes_no_other(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    words = ("--source", source, "--target", tmp_path / "megatron", "--hf-files", source)
    answer = convert("to-megatron", *words)
    assert answer.code == 2
    assert f"--hf-files: the source has a {source / 'config.json'}; leave the flag out" in answer.err


RUN = """
import sys
from pathlib import Path
from tools.convert.cli import tool
try:
    tool.run(sys.argv[1:])
finally:
    print(Path("/proc/self/status").read_text())
"""


def test_memory_is_less_than_a_rank_and_what_the_plan_says(tmp_path: Path) -> None:
    """Ranks of 252 MB each under a limit of 120 MB, of which numpy, which puts columns side by side, takes much."""
    limit = 120 << 20
    big = TINY.with_values(
        hidden_size=2048,
        mlp={"ffn_hidden_size": 24_576},
        attention={"head_dim": 512},
        vocab_size=16_384,
        num_layers=2,
        residual={"input_multiplier": 2.0},
    )
    shapes = {s.name: s.shape for entry in registry.table_of(big).entries() for s in entry.sources}
    source = cut(tmp_path / "sat", {name: torch.ones(shape, dtype=torch.half) for name, shape in shapes.items()}, 2)
    assert rank(source, 0).stat().st_size > 2 * limit
    (source / "config.json").write_text(json.dumps(registry.to_config(big)))
    words = ("to-megatron", "--source", source, "--target", tmp_path / "megatron", "--workers", "2")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    stated = re.search(r"at most ([\d.]+) MiB of memory", done.stderr)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert stated is not None
    assert peak is not None
    assert int(peak[1]) << 10 <= float(stated[1]) * (1 << 20)
