"""Adapters against PEFT's on the same models in transformers: gradients, three updates of AdamW, at every layout."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.errors import UserError
from shared.families import registry
from shared.mapping.adapters import LoraSettings, adapted_linears, adapter_copies, peft_names, peft_shapes
from shared.model import gpt, lora
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.trainable import Lora
from tests.shared.training.conftest import tiny_config
from tests.workers import ROOT, results_of

CONVERT = ROOT / "tools" / "convert" / ".venv" / "bin" / "python"
PEFT = ROOT / "tools" / "rlhf" / ".venv" / "bin" / "python"  # rlhf's environment has it
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name -> config.json, arguments of LoraConfig
CASES = {
    "dense": (
        {**SMALL, "model_type": "qwen3", "head_dim": 8, "num_hidden_layers": 4, "tie_word_embeddings": True},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "fused": (  # one matrix for q, k and v, one for gate and up
        {**SMALL, "model_type": "phi3", "pad_token_id": 0},
        {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "use_rslora": True},
    ),
    "moe": (
        {
            **SMALL,
            "model_type": "qwen3_moe",
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS},
    ),
    "delta": (  # a gated delta net, and attention with a gate
        {
            **SMALL,
            "model_type": "qwen3_next",
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {"target_modules": ["q_proj", "k_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"]},
    ),
}
TENSORS = {"tensor": 2, "sequence_parallel": True}
# case -> layout -> fields of ParallelConfig, and "recompute", "loop", "processes"
LAYOUTS: dict[str, dict[str, dict]] = {
    "dense": {
        "one": {"processes": 1},
        "recompute": {"processes": 1, "recompute": ("full",)},
        "data": {},
        "tensor": {"tensor": 2},
        "sequence": TENSORS,
        "pipeline": {"pipeline": 2, "virtual_pipeline": 2, "recompute": ("full",)},
        "context": {"context": 2},
    },
    "fused": {"one": {"processes": 1, "recompute": ("core_attn", "mlp")}, "tensor": {"tensor": 2}},
    "moe": {
        "one": {"processes": 1},
        "loop": {"processes": 1, "loop": True},
        "expert": {"expert": 2},
        "sequence": {**TENSORS, "expert": 2, "expert_tensor": 1},
    },
    "delta": {"one": {"processes": 1}, "sequence": {**TENSORS, "expert_tensor": 1}},
}
RESUMED = {("dense", "one"), ("dense", "sequence"), ("dense", "pipeline"), ("moe", "one"), ("moe", "sequence")}
PAIRS = [(case, name) for case, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """The directory of everything, and the results of every case and layout."""
    folder = tmp_path_factory.mktemp("lora")
    cases = {
        name: {"config": config, "lora": {"r": 4, "lora_alpha": 8, **lora}} for name, (config, lora) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    made = subprocess.run(
        [PEFT, "-W", "ignore", Path(__file__).with_name("peft_reference.py"), folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    for name in CASES:
        paths = ("--source", folder / name / "hf", "--target", folder / name / "megatron")
        convert = [CONVERT, "-m", "tools.convert.cli", "to-megatron", *paths]
        subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
    given: dict[str, dict] = {}
    for case, name in PAIRS:
        layout = dict(LAYOUTS[case][name])
        processes, recompute = layout.pop("processes", 2), layout.pop("recompute", ("none",))
        config = tiny_config(
            sequence_length=24, weight_decay=0.0, mtp_loss_scaling_factor=0.0, recompute=recompute, micro_batch_size=2
        )
        given.setdefault(case, {})[name] = {
            "processes": processes,
            "loop_of_experts": layout.pop("loop", False),
            "parallel": layout,
            "config": asdict(config),
            "lora": asdict(settings_of(case)),
            "resume": (case, name) in RESUMED,
        }
    (folder / "layouts.json").write_text(json.dumps(given))
    return folder, results_of(Path(__file__).with_name("lora_worker.py"), folder)


def settings_of(case: str) -> LoraSettings:
    """The settings here that are a case's in PEFT."""
    given = CASES[case][1]
    targets = [name for kind in ("target_modules", "target_parameters") for name in given.get(kind, ())]
    return LoraSettings(rank=4, alpha=8, rslora=given.get("use_rslora", False), targets=tuple(targets))


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_losses_and_gradient_norms_are_pefts(trained, case, layout):
    """1e-5: fp32 sums in another order."""
    wanted = json.loads((trained[0] / case / "numbers.json").read_text())
    for ours, theirs in zip(trained[1][case][layout]["first"], wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "layout"), [pair for pair in PAIRS if LAYOUTS[pair[0]][pair[1]].get("processes") == 1]
)
def test_gradients_of_every_a_and_b_are_pefts(trained, case, layout):
    """1e-5 of each matrix's norm: fp32 sums in another order."""
    assert trained[1][case][layout]["gradient"] < 1e-5


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_adapters_after_three_updates_are_pefts(trained, case, layout):
    """Read from the saved state, which holds nothing else. 1e-3: AdamW divides by tiny square roots; PEFT moved them by more
    than a tenth."""
    folder = trained[0] / case
    reader, settings = TorchDistReader(folder / layout), settings_of(case)
    linears = adapted_linears(registry.table_of(registry.from_files(folder / "hf")), settings.targets)
    assert {key: tensor.shape for key, tensor in reader.tensors.items()} == {
        key: shape for linear in linears.values() for key, shape in linear.tensors(settings.rank).items()
    }
    found = {name: torch.empty(shape) for name, shape in peft_shapes(linears, settings.rank).items()}
    names = peft_names(linears)
    for linear in linears.values():
        for copy in adapter_copies(linear, names, settings.rank):
            key = f"{linear.key}.{copy.tensor}"
            rows = b"".join(map(bytes, reader.rows(key, linear.index, 0, reader.tensors[key].shape[len(linear.index)])))
            tensor = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(reader.tensors[key].shape[-2:])
            found[copy.peft][copy.block] = tensor[copy.rows]
    before, after = (load_file(folder / place / "adapter_model.safetensors") for place in ("adapter", "after"))
    assert found.keys() == after.keys()
    for name, tensor in after.items():
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name
        assert (before[name] - tensor).norm() > 0.1 * tensor.norm(), name


@pytest.mark.parametrize(("case", "layout"), sorted(RESUMED))
def test_a_resume_continues_bit_for_bit(trained, case, layout):
    found = trained[1][case][layout]
    assert found["resumed"] == found["continued"]
    if "resumed_from_one_process" in found:
        for ours, theirs in zip(found["resumed_from_one_process"], trained[1][case]["one"]["continued"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)  # fp32 sums in another order


def build(size: str, dtype: torch.dtype = torch.float32, **targets) -> list:
    """A model of one process with adapters."""
    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(registry.sizes()[size], ParallelConfig(), dtype=dtype, perform_initialization=True)
    Lora(LoraSettings(rank=8, alpha=16, **targets), 1).apply(chunks)
    return chunks


def logits(chunks: list) -> torch.Tensor:
    ids = torch.arange(24)[None]
    return chunks[0](ids, ids, None)


def test_a_new_adapter_changes_nothing_and_the_seed_decides_its_a():
    chunks = build("tiny")
    adapted = logits(chunks)
    for module in lora.adapted_modules(chunks):
        assert not module.lora_B.any()
        assert 0 < module.lora_A.abs().max() <= module.linear.columns**-0.5
        module.settings = replace(module.settings, alpha=0.0)
    assert torch.equal(logits(chunks), adapted)
    again = build("tiny")
    for one, other in zip(lora.adapted_modules(chunks), lora.adapted_modules(again), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
    assert len({module.lora_A[0, 0].item() for module in lora.adapted_modules(chunks)}) == 8


def test_only_adapters_are_trained_and_a_router_keeps_its_correction_bias():
    chunks = build("deepseek-v3-tiny", targets=("kv_b_proj", "mlp.experts.down_proj"))
    trained = {name for name, parameter in chunks[0].named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in chunks[0].named_parameters() if name.endswith(lora.NAMES)}
    assert {name.split(".")[-2] for name in trained} == {"linear_kv_up_proj", "linear_fc2"}
    assert all(layer.mlp.router.frozen_expert_bias for layer in chunks[0].decoder.layers[1:])


def test_dropout_drops_in_training_only_and_is_drawn_again():
    chunks = build("tiny", dropout=0.5)
    with torch.no_grad():
        for module in lora.adapted_modules(chunks):
            module.lora_B.normal_()
    chunks[0].train()
    assert not torch.equal(logits(chunks), logits(chunks))
    chunks[0].eval()
    assert torch.equal(logits(chunks), logits(chunks))
    module = next(lora.adapted_modules(chunks))
    module.train()
    dropped = module.dropped(torch.ones(1000))
    assert set(dropped.tolist()) == {0.0, 2.0}


def test_experts_cut_by_expert_tensor_parallelism_are_refused(monkeypatch):
    monkeypatch.setattr(lora.parallel_state, "get_expert_tensor_parallel_world_size", lambda: 2)
    with pytest.raises(UserError, match="LoRA on experts needs --expert-tensor-parallel 1"):
        build("qwen3-moe-tiny")
    build("qwen3-moe-tiny", targets=("q_proj",))
