"""A merged adapter against PEFT's merge and against the model with the unmerged adapter."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.checkpoint.dtypes import BY_SAFETENSORS, to_float64
from shared.checkpoint.formats.hugging_face import HfReader, default_layout, write_weights
from shared.families import registry
from shared.mapping.rule import Source, name_variants

ROOT = Path(__file__).resolve().parents[3]
PEFT = ROOT / "tools" / "rlhf" / ".venv" / "bin" / "python"  # rlhf's environment has it
Make = Callable[..., Path]

SIZES = registry.sizes()
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (replace(SIZES["tiny"], vocab_size=259), {"shard_bytes": 100_000}),
    "llama-fp32": (SIZES["tiny"], {"dtype": "fp32"}),
    "llama-fp16": (SIZES["tiny"], {"dtype": "fp16"}),
    "llama-tied": (SIZES["tiny"].with_values(head={"tied": True}), {"dtype": "fp32", "shard_bytes": 200_000}),
    "qwen2": (SIZES["qwen2-tiny"].with_values(head={"tied": False}), {}),
    "gpt2": (SIZES["gpt2-tiny"], {}),
    "gpt2-bare": (SIZES["gpt2-tiny"], {"without_prefix": True}),
    "mixtral": (SIZES["mixtral-tiny"], {}),
    "qwen2-moe": (SIZES["qwen2-moe-tiny"], {}),
    "gpt-oss": (SIZES["gpt-oss-tiny"], {}),
    "gemma3-images": (SIZES["gemma3-images-tiny"], {}),
}
_QV = ["q_proj", "v_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
# name -> base, arguments of LoraConfig, what else the worker is asked for, tensors that change
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "linear": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": [*_QV, "gate_proj", "down_proj"]}, {}, 8),
    "fp32": ("llama-fp32", {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"}, {}, 14),
    "fp16": ("llama-fp16", {"r": 8, "lora_alpha": 12, "target_modules": _QV}, {"half": True}, 4),
    "bin": ("llama", {"target_modules": _QV}, {"bin": True}, 4),
    "regex-rslora": ("llama", {"r": 4, "target_modules": r".*\.1\..*(q|o)_proj", "use_rslora": True}, {}, 2),
    "one-layer": ("llama", {"r": 4, "target_modules": _QV, "layers_to_transform": [1]}, {}, 2),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": _QV,
            "rank_pattern": {"q_proj": 6, "layers.1.self_attn.v_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
        {},
        4,
    ),
    "ends": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}, {}, 4),
    "modules-to-save": ("llama", {"target_modules": _QV, "modules_to_save": ["lm_head", "embed_tokens"]}, {}, 6),
    "dora": ("llama", {"r": 4, "target_modules": [*_QV, "down_proj"], "use_dora": True}, {}, 6),
    "dora-fp32": ("llama-fp32", {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {}, 3),
    "biases": ("qwen2", {"r": 4, "target_modules": _QV, "bias": "all"}, {"biases": True}, 10),
    "own-biases": ("qwen2", {"r": 4, "target_modules": _QV, "bias": "lora_only"}, {"biases": True}, 8),
    "conv1d": ("gpt2", {"r": 4, **_GPT2}, {}, 8),
    "conv1d-without-prefix": ("gpt2-bare", {"r": 4, **_GPT2}, {}, 8),
    "conv1d-dora": ("gpt2", {"r": 4, **_GPT2, "use_dora": True}, {}, 8),
    "experts": ("mixtral", {"r": 4, "target_modules": _QV, "target_parameters": _EXPERTS}, {}, 4 + 2 * 4 * 3),
    "experts-in-one": ("gpt-oss", {"r": 4, "target_modules": _QV, "target_parameters": _EXPERTS}, {}, 4 + 2 * 2),
    "shared-expert": (
        "qwen2-moe",
        {
            "r": 4,
            "target_modules": ["q_proj", "shared_expert.up_proj"],
            "target_parameters": [_EXPERTS[1], "mlp.gate.weight"],
        },
        {},
        2 + 2 + 2 * 6 + 2,
    ),
    "trained-tokens": ("llama", {"r": 4, "target_modules": _QV, "trainable_token_indices": [5, 250, 7]}, {}, 5),
    "trained-tokens-of-both": (
        "llama",
        {
            "r": 4,
            "target_modules": _QV,
            "trainable_token_indices": {"embed_tokens": [0, 258], "lm_head": [9]},
        },
        {},
        6,
    ),
    "trained-tokens-tied": (
        "llama-tied",
        {"r": 4, "target_modules": _QV, "trainable_token_indices": [5, 250, 7]},
        {},
        5,
    ),
    # of the class that sees images: its tower has projections of these names too
    "images": ("gemma3-images", {"r": 4, "target_modules": [*_QV, "down_proj", "fc1"]}, {}, 2 * 3 + 2 * 3),
    "images-text": ("gemma3-images", {"r": 4, "target_modules": r".*language_model.*\.(q|o)_proj"}, {}, 4),
}
# name -> base, arguments of LoraConfig, new rows. PEFT saves embedding and head whole, and what it wrapped under further names.
RESIZED: dict[str, tuple[str, dict[str, Any], int]] = {
    "resized": ("llama", {"r": 4, "target_modules": _QV}, 300),
    "resized-shorter": ("llama-fp32", {"r": 4, "target_modules": _QV}, 500),
    "resized-tied": ("llama-tied", {"r": 4, "target_modules": _QV}, 600),
    "resized-saved": (
        "llama-fp32",
        {"r": 4, "target_modules": _QV, "modules_to_save": ["embed_tokens", "lm_head"]},
        600,
    ),
    "resized-ends": ("llama-fp32", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}, 600),
    "resized-tokens": ("llama-fp32", {"r": 4, "target_modules": _QV, "trainable_token_indices": [5, 570]}, 600),
    "resized-tied-tokens": ("llama-tied", {"r": 4, "target_modules": _QV, "trainable_token_indices": [5, 570]}, 600),
    "resized-images": ("gemma3-images", {"r": 4, "target_modules": ["q_proj"]}, 600),
}
TIED = {
    "tied-head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "tied-embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "tied-saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
TIED_RESIZED = {f"{name}-resized": lora for name, lora in TIED.items()}  # to 600 rows
# Baton rounds the exact number once. PEFT computes in fp32, in the order of its BLAS, which depends on the processor, and rounds
# that to 16 bits; of embeddings, parameters and experts first `scale * B @ A`, then the sum. In ulp of the larger of W and the
# result:
ONE_ROUNDING_EACH = 1  # half an ulp each; fp32's errors are 2^-13 of that
TWO_ROUNDINGS = 2  # and half an ulp of `scale * B @ A`, which is up to twice as large
TWICE = {"ends", "experts", "experts-in-one", "shared-expert"}
# In fp32 ulp of the tensor's largest number: no partial sum is larger here.
FP32_PRODUCT = 8  # half an ulp for each addition of the 8 products, and a few
FP32_DORA = 16  # as many again for norm, quotient and product
# fp32 logits of the adapter beside the model and within it: sums in another order, as in `convert verify`.
LOGITS = 1e-4


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, write_architecture: Make) -> Path:
    """Bases, and what PEFT made of them: once, also where several processes test."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "peft"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "cases.json").exists():
            make_all(place, write_architecture)
    return place


def make_all(place: Path, write_architecture: Make) -> None:
    for name, (architecture, options) in BASES.items():
        write_architecture(place / name, architecture, **options)
    names = {"fp32": "float32", "fp16": "float16"}
    cases = [(name, base, lora, more) for name, (base, lora, more, _) in CASES.items()]
    cases += [
        (name, base, lora, {"rows": rows, "ends": base == "gemma3-images"})
        for name, (base, lora, rows) in RESIZED.items()
    ]
    cases += [(name, "llama-tied", lora, {"logits": True}) for name, lora in TIED.items()]
    cases += [(name, "llama-tied", lora, {"logits": True, "rows": 600}) for name, lora in TIED_RESIZED.items()]
    listed = [
        {
            "name": name,
            "base": str(place / base),
            "out": str(place / "of" / name),
            "dtype": names.get(BASES[base][1].get("dtype", ""), "bfloat16"),
            "lora": lora,
            **more,
        }
        for name, base, lora, more in cases
    ]
    (place / "asked.json").write_text(json.dumps(listed))
    words = [PEFT, "-W", "ignore", Path(__file__).with_name("peft_worker.py"), place / "asked.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (place / "asked.json").rename(place / "cases.json")


def weights(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of each tensor."""
    reader = HfReader(directory)
    return {n: (t.dtype, t.shape, b"".join(map(bytes, reader.rows(n)))) for n, t in reader.tensors.items()}


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def numbers(content: bytes, dtype: str) -> np.ndarray:
    return to_float64(memoryview(content), BY_SAFETENSORS[dtype])


def in_ulp(ours: np.ndarray, theirs: np.ndarray, base: np.ndarray, dtype: str) -> float:
    """The largest distance, in the ulp stated above."""
    bits = {"F32": 24, "BF16": 8, "F16": 11}[dtype]
    size = np.maximum(np.abs(theirs), np.abs(base))
    _, exponent = np.frexp(size.max() if dtype == "F32" else size)
    return float((np.abs(ours - theirs) / np.ldexp(1.0, exponent - bits)).max())


def allowed(case: str, lora: dict[str, Any], dtype: str) -> int:
    if dtype == "F32":
        return FP32_DORA if lora.get("use_dora") else FP32_PRODUCT
    return TWO_ROUNDINGS if case in TWICE else ONE_ROUNDING_EACH


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_that_peft_merges(made: Path, convert: Any, tmp_path: Path, case: str) -> None:
    """Within the ulp stated above; what the adapter does not touch is the base's bit for bit, files included."""

    base, lora, _, changed = CASES[case]
    adapter, out = made / "of" / case / "adapter", tmp_path / "out"
    answer = convert("merge-lora", "--source", made / base, "--adapter", adapter, "--target", out)
    assert answer.code == 0, answer.err
    assert f"adapter of {made / base}; changes {changed} tensors" in answer.err
    ours, theirs, before = (weights(path) for path in (out, made / "of" / case / "merged", made / base))
    assert ours.keys() == before.keys()
    prefix_variants = registry.table_of(BASES[base][0]).prefix_variants
    for name, tensor in ours.items():
        wanted = next(theirs[other] for other in name_variants(name, prefix_variants) if other in theirs)
        assert tensor[:-1] == wanted[:-1], name
        if wanted == before[name]:
            assert tensor == wanted, name
        else:
            distance = in_ulp(
                *(numbers(content, dtype) for dtype, _, content in (tensor, wanted, before[name])), tensor[0]
            )
            assert distance <= allowed(case, lora, tensor[0]), name
    assert sum(tensor != before[name] for name, tensor in ours.items()) == changed
    source, result = files(made / base), files(out)
    assert result.keys() - {"manifest.json", "README.md"} == source.keys()
    assert f"`--source {base}`, `--adapter adapter`\n" in result["README.md"].decode()
    assert all(result[name] == content for name, content in source.items() if not name.endswith(".safetensors"))
    manifest = json.loads(result["manifest.json"])
    assert [(parent["flag"], parent["name"]) for parent in manifest["parents"]] == [
        ("source", base),
        ("adapter", "adapter"),
    ]


@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_is_the_one_that_peft_merges(made: Path, convert: Any, tmp_path: Path, case: str) -> None:
    base, lora, rows = RESIZED[case]
    adapter, out = made / "of" / case / "adapter", tmp_path / "out"
    answer = convert("merge-lora", "--source", made / base, "--adapter", adapter, "--target", out)
    assert answer.code == 0, answer.err
    assert f"vocab_size: {rows}, as the adapter's embedding" in answer.err
    ours, theirs = weights(out), weights(made / "of" / case / "merged")
    prefix_variants = registry.table_of(BASES[base][0]).prefix_variants
    for name, tensor in ours.items():
        wanted = next(theirs[other] for other in name_variants(name, prefix_variants) if other in theirs)
        assert tensor[:-1] == wanted[:-1], name
        one, other = (numbers(content, dtype) for dtype, _, content in (tensor, wanted))
        assert in_ulp(one, other, other, tensor[0]) <= allowed(case, lora, tensor[0]), name
    assert ours.keys() == weights(made / base).keys()
    before, after = (json.loads((path / "config.json").read_text()) for path in (made / base, out))
    place = (lambda config: config["text_config"]) if "text_config" in before else (lambda config: config)
    assert place(after)["vocab_size"] == rows
    place(after)["vocab_size"] = place(before)["vocab_size"]
    assert before == after
    assert convert("to-megatron", "--source", out, "--target", tmp_path / "megatron").code == 0


@pytest.mark.parametrize("case", [*TIED, *TIED_RESIZED])
def test_tied_embeddings_part_where_only_one_of_them_changes(
    made: Path, convert: Any, tmp_path: Path, case: str
) -> None:
    """The merged model is the one that was trained: the base and its adapter side by side."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out, of = tmp_path / "out", made / "of" / case
    answer = convert("merge-lora", "--source", made / "llama-tied", "--adapter", of / "adapter", "--target", out)
    assert answer.code == 0, answer.err
    assert "lm_head.weight and model.embed_tokens.weight: untied" in answer.err
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits
    wanted = load_file(of / "logits.safetensors")["logits"]
    assert (logits - wanted).abs().max() <= LOGITS * wanted.std()
    assert convert("to-megatron", "--source", out, "--target", tmp_path / "megatron").code == 0


def test_the_number_of_workers_changes_nothing_and_again_is_done(made: Path, convert: Any, tmp_path: Path) -> None:
    words = ("merge-lora", "--source", made / "llama", "--adapter", made / "of" / "linear" / "adapter")
    for workers in (1, 3):
        assert convert(*words, "--target", tmp_path / str(workers), "--workers", workers).code == 0
    one, three = (weights_bytes(tmp_path / str(workers)) for workers in (1, 3))
    assert one == three
    assert "already done" in convert(*words, "--target", tmp_path / "1").err


def weights_bytes(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(directory).items() if name.endswith(".safetensors")}


def plain_adapter(directory: Path, base: Path, sources: list[Source], rank: int = 8, **fields: Any) -> None:
    """An adapter as PEFT writes it, made without PEFT."""
    directory.mkdir()
    triples = []
    for source in sources:
        module = f"base_model.model.{source.name.removesuffix('.weight')}"
        rows, columns = source.shape
        triples += [
            (f"{module}.lora_A.weight", "F32", (rank, columns)),
            (f"{module}.lora_B.weight", "F32", (rows, rank)),
        ]
    generator = np.random.default_rng(0)

    def numbers(tensor: Any) -> Iterator[memoryview]:
        yield memoryview(generator.standard_normal(tensor.size // 4, dtype=np.float32) * np.float32(0.1)).cast("B")

    write_weights(
        directory, default_layout(triples, file="adapter_model.safetensors"), numbers, lambda name, digest: None
    )
    targets = sorted({source.name.removesuffix(".weight").rpartition(".")[2] for source in sources})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": targets,
        "base_model_name_or_path": str(base),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))


def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    """A matrix of 90 MB, of which a strip is held at a time."""
    from tests.benchmarks.checkpoints import generate
    from tests.tools.convert.test_conversion_report import converted

    architecture = SIZES["tiny"].with_values(hidden_size=2048, mlp={"ffn_hidden_size": 22_000}, num_layers=1)
    generate(tmp_path / "hf", architecture)
    sources = [source for entry in registry.table_of(architecture).entries() for source in entry.sources]
    plain_adapter(
        tmp_path / "adapter", tmp_path / "hf", [s for s in sources if "mlp" in s.name and len(s.shape) == 2], rank=16
    )
    words = (
        "--source",
        tmp_path / "hf",
        "--adapter",
        tmp_path / "adapter",
        "--target",
        tmp_path / "out",
        "--workers",
        "2",
    )
    stated, peak = converted(400 << 20, "merge-lora", *words)
    assert peak <= stated
    assert stated < 2048 * 22_000 * 4


def change(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def base(make_hf: Make) -> Path:
    return make_hf("llama-gqa")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    sources = [s for e in registry.table_of(replace(SIZES["tiny"], vocab_size=259)).entries() for s in e.sources]
    plain_adapter(tmp_path / "adapter", base, [s for s in sources if "q_proj" in s.name])
    return tmp_path / "adapter"


REFUSED = {
    "peft_type": ("LOHA", "only LORA"),
    "lora_bias": (True, "lora_bias is True"),
    "layer_replication": ([[0, 1]], "layer_replication"),
    "trainable_token_indices": ([3], "names the embedding, without tensors in the adapter"),
    "alora_invocation_tokens": ([5], "alora_invocation_tokens"),
    "ensure_weight_tying": (True, "ensure_weight_tying"),
    "init_lora_weights": ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
    "a_field_of_tomorrow": ("on", "a_field_of_tomorrow is 'on'"),
    "use_dora": (True, "no lora_magnitude_vector"),
    "r": (4, "ask for [4, 64]"),
    "target_modules": (
        ["q_proj", "v_proj"],
        "layers.0.self_attn.v_proj.weight and 1 more, without tensors in the adapter",
    ),
    "modules_to_save": (["lm_head"], "targets lm_head, without tensors in the adapter"),
    "bias": ("both", "bias is 'both'"),
    "lora_alpha": (None, "lora_alpha is None: Input should be a valid number"),
    "rank_pattern": ({"q_proj": 0}, "rank_pattern is {'q_proj': 0}: Input should be greater than 0"),
    "alpha_pattern": ({"(": 3}, "alpha_pattern is {'(': 3}: Value error, invalid regular expression"),
    "exclude_modules": ("(", "exclude_modules is '('"),
    "layers_to_transform": (["1"], "layers_to_transform is ['1']"),
    "target_parameters": (5, "target_parameters is 5"),
    "use_rslora": ("yes", "use_rslora is 'yes'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_merged_is_refused_by_name(
    base: Path, adapter: Path, convert: Any, tmp_path: Path, name: str
) -> None:
    value, words = REFUSED[name]
    change(adapter, **{name: value})
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert words in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj.lora_C", "which the base lacks"),
        ("layers.1.self_attn.q_proj", "layers.9.self_attn.q_proj", "no matrix of the base"),
        ("base_model.model.model.layers.1", "base_model.other.model.layers.1", "is no tensor name of PEFT"),
        (
            "layers.1.self_attn.q_proj.lora_B",
            "layers.0.self_attn.k_proj.lora_B",
            "lora_A is missing; save or fetch the adapter again",
        ),
    ],
)
def test_a_tensor_that_is_left_over_is_refused(
    base: Path, adapter: Path, convert: Any, tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().replace(old, new).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert words in answer.err


def test_numbers_that_are_not_finite_are_refused(base: Path, adapter: Path, convert: Any, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert answer.code == 2
    assert "model.layers.1.self_attn.q_proj.weight is not finite in bfloat16 after merging" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(base: Path, adapter: Path, convert: Any, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    reader, name = HfReader(base), "model.layers.0.self_attn.q_proj.weight"
    tensors = {n: (t.dtype, t.shape, b"".join(map(bytes, reader.rows(n)))) for n, t in reader.tensors.items()}
    tensors[name] = ("F8_E4M3", tensors[name][1], tensors[name][2][::2])
    for file in base.glob("model*"):
        file.unlink()
    layout = default_layout([(n, d, s) for n, (d, s, _) in tensors.items()])
    write_weights(base, layout, lambda t: [memoryview(tensors[t.name][2])], lambda name, digest: None)
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "quantised" in answer.err


def vocabulary(**ids: int) -> str:
    return json.dumps({"model": {"vocab": ids}})


def test_the_adapter_s_tokenizer_and_template_are_published(
    base: Path, adapter: Path, convert: Any, tmp_path: Path
) -> None:
    (adapter / "tokenizer.json").write_text(vocabulary(a=0, b=258))  # a row that the base has and did not use
    (adapter / "chat_template.jinja").write_text("{{ other }}")
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "from the adapter: tokenizer.json, chat_template.jinja" in answer.err
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", vocabulary(a=0, b=259), "1 tokens beyond the base's 259 embeddings ('b')"),
        ("tokenizer.json", vocabulary(a=1), "token 'a' is 1, in the base 0"),
        ("tokenizer.json", vocabulary(b=3), "token 'a' is missing, in the base 0"),
    ],
)
def test_another_vocabulary_is_refused(
    base: Path, adapter: Path, convert: Any, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (adapter / name).write_text(content)
    answer = convert("merge-lora", "--source", base, "--adapter", adapter, "--target", tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 2), answer.err  # the adapter's base is told before
    assert words in answer.err
    assert re.search(r"remove the tokenizer from", answer.err)
