"""Adapters of runs with LoRA, published by `to-hf`: PEFT and transformers compute our logits, for every family that trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from shared.checkpoint.directory.adapter_directory import FACT, base_of
from shared.checkpoint.directory.manifest import read_manifest
from shared.checkpoint.directory.run_directory import RunDirectory
from shared.checkpoint.formats.safetensors_file import read_header
from shared.families import registry
from shared.invocation import invoked
from shared.mapping.adapters import LoraSettings

ROOT = Path(__file__).resolve().parents[3]
PEFT = ROOT / "tools" / "rlhf" / ".venv" / "bin" / "python"  # rlhf's environment has it
TOLERANCE = 1e-5  # of the logits' spread: fp32 sums in another order
# One size of each family, and what else differs in its adapters.
_TINY = {size: architecture for size, architecture in registry.sizes().items() if "tiny" in size}
SIZES = {architecture.family: size for size, architecture in reversed(_TINY.items())}
CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (size, {}) for family, size in SIZES.items()} | {
    "some": ("tiny", {"targets": ("q_proj", "self_attn.v_proj", "up_proj"), "rslora": True}),
    "experts": ("qwen3-moe-tiny", {"targets": ("mlp.experts.down_proj",)}),
    "shared-experts": ("deepseek-v2-tiny", {"targets": ("kv_b_proj", "shared_experts.gate_proj")}),
}


@dataclass
class Published:
    """A run with LoRA and its adapter."""

    base: Path
    megatron: Path
    run: Path
    adapter: Path


def make_run(case: str, folder: Path, write: Any, tool: Any) -> Published:
    """A base in both formats, a run directory with random adapters, our logits, and the published adapter."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from shared.model import gpt, lora, weights
    from shared.model.logits import logits
    from shared.model.prefix_lm import with_blank
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize
    from shared.training.state import write_from_threads
    from shared.training.trainable import Lora

    size, given = CASES[case]
    architecture = registry.sizes()[size]
    made = Published(*(folder / name for name in ("hf", "megatron", "run", "adapter")))
    write(made.base, architecture, dtype="fp32", scale=0.1)
    call(tool, "to-megatron", source=made.base, target=made.megatron)
    settings = LoraSettings(rank=4, alpha=6, **given)
    initialize(ParallelConfig(), 0)
    chunks = gpt.build(architecture, ParallelConfig(), dtype=torch.float32)
    weights.load(chunks, made.megatron / "release")
    generator = torch.Generator().manual_seed(1)
    ids = with_blank(torch.randint(509, (1, 40), generator=generator), architecture)
    chunks[0].eval()
    before = logits(chunks, ids)
    Lora(settings, 1).apply(chunks)
    with torch.no_grad():
        for module in lora.adapted_modules(chunks):
            module.lora_B.normal_(std=0.05, generator=generator)
    after = logits(chunks, ids)
    torch.save(ids, folder / "ids.pt")
    torch.save((before, after), folder / "ours.pt")
    source = read_manifest(made.megatron, flag="--source")
    with invoked("sft", "train", {}):
        run = RunDirectory.open(made.run, kind="megatron", inputs={"source": made.megatron})
        run.add_auxiliary_files(made.megatron / "hf")
        written = run.begin(3)
        write_from_threads()
        monkeypatched = pytest.MonkeyPatch()
        monkeypatched.setattr(filesystem_async, "_process_memory", lambda: 0)  # psutil, for a debugging line
        dist_checkpointing.save(lora.adapters_of(weights.sharded_state_dict(chunks)["model"]), str(written))
        monkeypatched.undo()
        adapter = {
            **asdict(settings),
            "targets": list(settings.targets),
            "base": base_of(made.megatron, source, made.run),
        }
        run.commit(3, facts={"family": architecture.family, FACT: adapter}, finished=True)
        run.close()
    call(tool, "to-hf", source=made.run, target=made.adapter, base=made.base)
    return made


def call(tool: Any, command: str, **options: Path) -> None:
    words = [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    with pytest.raises(SystemExit) as ended:
        tool.run(words)
    assert not ended.value.code, words


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, write_architecture: Any) -> dict[str, Published]:
    """Every case, and PEFT's logits beside it."""
    from tools.convert.cli import tool
    from tools.convert.verify_logits import attention_of

    folder = tmp_path_factory.mktemp("adapters")
    made, asked = {}, []
    for case, (size, _) in CASES.items():
        made[case] = make_run(case, folder / case, write_architecture, tool)
        architecture = registry.sizes()[size]
        asked.append(
            {
                "base": str(made[case].base),
                "adapter": str(made[case].adapter),
                "attention": attention_of(architecture),
                "remote": registry.FAMILIES[architecture.family].remote,
            }
        )
    (folder / "cases.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [PEFT, "-W", "ignore", Path(__file__).with_name("peft_logits.py"), folder / "cases.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_our_logits(published: dict[str, Published], case: str) -> None:
    import torch

    folder = published[case].run.parent
    before, after = torch.load(folder / "ours.pt")
    theirs = torch.load(folder / "logits.pt")
    spread = theirs.std()
    assert (after - theirs).abs().max() < TOLERANCE * spread
    assert (after - before).abs().max() > 0.01 * spread  # the adapter counts


def test_what_is_published(published: dict[str, Published]) -> None:
    made = published["some"]
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../hf"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, True)
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    names = {tensor.name for tensor in read_header(made.adapter / "adapter_model.safetensors").tensors}
    assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in names
    assert len(names) == 2 * 2 * 3
    assert (made.adapter / "chat_template.jinja").read_text() == (made.base / "chat_template.jinja").read_text()
    card = ModelCard.load(made.adapter / "README.md")
    fields = card.data.to_dict()
    assert (fields["library_name"], fields["base_model"], fields["base_model_relation"]) == ("peft", "hf", "adapter")
    assert "1. `sft train` " in card.text
    assert "`--source megatron`" in card.text
    assert 'from_pretrained("../hf", dtype="auto")' in card.text
    manifest = read_manifest(made.adapter, flag="--source")
    assert manifest is not None
    assert (manifest.kind, manifest.facts["tensors"]) == ("adapter", 12)


@pytest.mark.parametrize("case", ["llama", "gpt2", "phi3", "qwen3_moe", "gpt_oss", "shared-experts"])
def test_merge_lora_merges_it(published: dict[str, Published], case: str, convert: Any, tmp_path: Path) -> None:
    """A merged weight is W + scale * B @ A."""
    made = published[case]
    answer = convert("merge-lora", "--source", made.base, "--adapter", made.adapter, "--target", tmp_path / "merged")
    assert answer.code == 0, answer.err
    changed = json.loads((tmp_path / "merged" / "manifest.json").read_text())["facts"]["adapted"]
    assert changed >= len(read_header(made.adapter / "adapter_model.safetensors").tensors) // 2


def test_merged_weights_are_those_of_the_formula(published: dict[str, Published], convert: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    made = published["some"]
    assert convert("merge-lora", "--source", made.base, "--adapter", made.adapter, "--target", tmp_path / "m").code == 0
    before, after = (load_file(place / "model.safetensors") for place in (made.base, tmp_path / "m"))
    adapter = load_file(made.adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    wanted = (before[f"{name}.weight"].double() + 6 / np.sqrt(4) * b @ a).float()
    assert torch.equal(after[f"{name}.weight"], wanted)


def test_what_needs_a_model_refuses_the_run(published: dict[str, Published], convert: Any, tmp_path: Path) -> None:
    made = published["llama"]
    answer = convert("to-hf", "--source", made.run, "--target", tmp_path / "out")
    assert answer.code == 2
    assert f"holds LoRA adapters only, without their base ({made.megatron})" in answer.err
    assert f"`convert to-hf --source {made.run} --base HF_DIR`" in answer.err
    alone = shutil.copytree(made.run, tmp_path / "elsewhere" / "run")
    assert "which is missing" in convert("to-hf", "--source", alone, "--target", tmp_path / "out").err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--base", "{run}"), "has no config.json"),
        (("--base", "{other}"), "is another model than the run's base"),
        (("--base", "{hf}", "--dtype", "bf16"), "--dtype is for weights of a model"),
        (("--base", "{hf}", "--iteration", "2"), "--iteration 2 is not in"),
    ],
)
def test_mistakes(published: dict[str, Published], convert: Any, tmp_path: Path, words: Any, text: str) -> None:
    made = published["llama"]
    places = {"run": made.run, "hf": made.base, "other": published["gpt2"].base}
    given = [word.format(**places) for word in words]
    answer = convert("to-hf", "--source", made.run, "--target", tmp_path / "out", *given)
    assert answer.code == 2
    assert text in answer.err
    assert not (tmp_path / "out").exists()


def test_a_base_for_a_run_without_lora_is_refused(
    published: dict[str, Published], convert: Any, tmp_path: Path
) -> None:
    made = published["llama"]
    answer = convert("to-hf", "--source", made.megatron, "--target", tmp_path / "out", "--base", made.base)
    assert answer.code == 2
    assert "is no run with LoRA; leave --base out" in answer.err


def test_inspect_shows_the_adapter_and_its_base(published: dict[str, Published], convert: Any) -> None:
    made = published["experts"]
    found = json.loads(convert("inspect", made.run, "--json").out)
    assert found["adapter"] == "rank 4, alpha 6, targets mlp.experts.down_proj"
    assert found["base"] == str(made.megatron)
    assert "problem" not in found
    assert found["tensors"] == 2
