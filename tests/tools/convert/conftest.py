"""Tiny checkpoints of every kind, and the tool's command line."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from shared.architecture.architecture import Architecture, RopeScaling
from shared.checkpoint.dtypes import BF16, BY_FLAG, FP32, Dtype, from_float32
from shared.checkpoint.formats.hugging_face import default_layout, write_weights
from shared.families import registry
from tools.convert.cli import tool

# Of families that transformers lacks: written down here from the published arithmetic, and put into checkpoints as the
# modelling code that such families are published with.
REFERENCES = Path(__file__).parents[2] / "references"

# transformers copies such code there before it runs it, and reads the variable when it is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modelling-code-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# Of families, the sizes that are small enough to run; FAMILIES chooses some while one family is worked on.
CHOSEN = os.environ.get("FAMILIES", "").split()
SIZES = {
    name: replace(size, vocab_size=509)  # padded, on every layout
    for name, size in registry.sizes().items()
    if "tiny" in name and (not CHOSEN or size.family in CHOSEN)
}

TINY = registry.sizes()["tiny"].with_values(vocab_size=259, rotary={"theta": 50_000.0})  # 259: padded on every layout
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_length=64)

LINEAR = RopeScaling(kind="linear", factor=4.0)

# name -> architecture and how the files differ from the plain ones
VARIANTS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "llama-gqa": (TINY, {}),
    "llama-mha-tied": (TINY.with_values(attention={"groups": 4}, head={"tied": True}, vocab_size=256), {}),
    "llama-mqa-head-dim": (TINY.with_values(attention={"groups": 1, "head_dim": 24}), {"dtype": "fp32"}),
    "llama-tied-head-stored": (TINY.with_values(head={"tied": True}), {"stored_head": True}),
    "llama-biases": (TINY.with_values(attention={"bias": True, "output_bias": True}, mlp={"bias": True}), {}),
    "llama-rope-llama3-sharded": (TINY.with_values(rotary={"scaling": LLAMA3}), {"shard_bytes": 100_000}),
    "llama-rope-linear": (TINY.with_values(rotary={"scaling": LINEAR}), {"dtype": "fp16"}),
    "llama-fp32-norms": (TINY, {"fp32": lambda name: "norm" in name}),
    "llama-one-fp32-layer": (TINY, {"fp32": lambda name: "layers.1" in name}),
    "llama-inv-freq": (TINY, {"inv_freq": True}),
    "qwen2-tied": (replace(registry.sizes()["qwen2-tiny"], vocab_size=259), {}),
    "qwen2-untied": (registry.sizes()["qwen2-tiny"].with_values(head={"tied": False}), {"shard_bytes": 80_000}),
    "qwen3": (replace(registry.sizes()["qwen3-tiny"], vocab_size=259), {}),
}


def write_hf(
    path: Path,
    architecture: Architecture,
    *,
    dtype: str = "bf16",
    fp32: Callable[[str], bool] = lambda name: False,
    stored_head: bool = False,
    inv_freq: bool = False,
    without_prefix: bool = False,
    shard_bytes: int = 1 << 30,
    seed: int = 0,
    scale: float = 0.2,
) -> Path:
    """A Hugging Face directory with weights large enough that every misplacement shows in the logits."""
    path.mkdir(parents=True)
    kinds: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
    around_one: set[str] = set()  # weights of norms, unless the family stores them less one
    table = registry.table_of(architecture)
    for entry in (table.with_names_of({""}) if without_prefix else table).entries():
        for source in entry.sources:
            kinds[source.name] = (FP32 if source.fp32 or fp32(source.name) else BY_FLAG[dtype], source.stored_shape)
            stored_whole = not architecture.layers[0].norm.zero_centered_gamma or entry.zero_centered_gamma
            if "norm" in entry.key and entry.key.endswith("weight") and stored_whole:
                around_one.add(source.name)
    kinds |= {name: (BY_FLAG[dtype], shape) for name, shape in table.required_pass_through().items()}
    copies = {tied.name: tied.tied_to for tied in table.tied_tensors if tied.always or stored_head}
    kinds |= {name: kinds[of] for name, of in copies.items()}
    if inv_freq:
        for layer in range(architecture.num_layers):
            kinds[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (
                FP32,
                (architecture.attention.head_dim // 2,),
            )
    layout = default_layout([(n, k.safetensors, s) for n, (k, s) in sorted(kinds.items())], shard_bytes)

    def blocks(tensor: Any) -> list[memoryview]:
        name = copies.get(tensor.name, tensor.name)
        generator = np.random.default_rng([seed, *name.encode()])
        kind, shape = kinds[name]
        values = generator.standard_normal(int(np.prod(shape)), dtype=np.float32) * np.float32(scale)
        return [from_float32(values + np.float32(name in around_one), kind)]

    write_weights(path, layout, blocks, lambda name, digest: None)
    config = registry.to_config(architecture, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
    if registry.FAMILIES[architecture.family].remote:
        (path / "modeling.py").write_bytes((REFERENCES / f"{architecture.family}.py").read_bytes())
        config["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.LanguageModel"}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text('{"temperature": 0.6}\n')
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "extra").mkdir()
    (path / "extra" / "note.txt").write_bytes(bytes(range(256)))
    return path


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Convert = Callable[..., Answer]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    def call(*words: str | Path) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            tool.run([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., Path]:
    def make(variant: str = "llama-gqa", name: str = "hf", **changes: Any) -> Path:
        architecture, options = VARIANTS[variant]
        return write_hf(tmp_path / name, architecture, **(options | changes))

    return make


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, Architecture]:
    return SIZES


@pytest.fixture(params=list(SIZES))
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def remote_code() -> Callable[[Architecture], list[str]]:
    """`verify`'s flag for families that transformers lacks."""
    return lambda a: ["--trust-remote-code"] if registry.FAMILIES[a.family].remote else []


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[[Path, str], Path]:
    return lambda path, variant: write_hf(path, VARIANTS[variant][0], **VARIANTS[variant][1])


@pytest.fixture(scope="session")
def write_architecture() -> Callable[..., Path]:
    return write_hf


@pytest.fixture
def overwrite_tensor() -> Callable[[Path, str, Callable[[np.ndarray], np.ndarray]], None]:
    """Change a bf16 tensor of a single-file checkpoint in place: the function gets `[rows, columns]` of bits."""

    def change(path: Path, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        from shared.checkpoint.formats.safetensors_file import read_header

        tensor = next(t for t in read_header(path).tensors if t.name == name)
        assert tensor.dtype == BF16.safetensors
        data = bytearray(path.read_bytes())
        place = slice(tensor.start, tensor.start + tensor.size)
        bits = np.frombuffer(bytes(data[place]), dtype=np.uint16).reshape(tensor.shape)
        data[place] = np.ascontiguousarray(function(bits)).tobytes()
        path.write_bytes(bytes(data))

    return change
