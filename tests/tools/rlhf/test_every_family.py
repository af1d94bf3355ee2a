"""Every family through `rlhf`: the published directory has every tensor and field of the source, or one line says why not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from shared.families import registry
from tools.rlhf.algorithms.reward import new_reward_model
from tools.rlhf.engines.preference_trainers import check_fused_log_probs
from tools.rlhf.models import load_critic, load_policy, open_source
from tools.rlhf.published_directory import save_hf
from tools.rlhf.rewards.reward_model import load_reward_model

SIZES = [name for name in registry.sizes() if "-tiny" in f"-{name}"]
DISTINCT = (
    "def distinct(prompts, completions, **columns):\n    return [float(place) for place in range(len(completions))]\n"
)
FAMILY = {name: registry.FAMILIES[registry.sizes()[name].family] for name in SIZES}


def _first(size: str) -> str:
    """The first tiny size of the size's family."""
    return next(name for name in SIZES if FAMILY[name] is FAMILY[size])


@pytest.fixture(scope="module")
def make(world: Any) -> Callable[[str, Path], dict[str, torch.Tensor]]:
    """Write a random model of a size, with the policy's tokenizer, in bf16; returns its tensors."""
    (world.root / "distinct.py").write_text(DISTINCT)
    tokenizer = AutoTokenizer.from_pretrained(world.policy)

    def write(size: str, directory: Path) -> dict[str, torch.Tensor]:
        architecture = replace(registry.sizes()[size], vocab_size=len(tokenizer))
        torch.manual_seed(0)
        weights = {}
        for source in {
            s.name: s for entry in registry.table_of(architecture).entries() for s in entry.sources
        }.values():
            dtype = torch.float32 if source.fp32 else torch.bfloat16
            norm = "norm" in source.name and len(source.shape) == 1
            weights[source.name] = torch.ones(source.stored_shape, dtype=dtype) if norm else _random(source, dtype)
        for name, shape in registry.table_of(architecture).required_pass_through().items():
            weights[name] = torch.randn(shape, dtype=torch.bfloat16) / 50
        tokenizer.save_pretrained(directory)
        special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        config = registry.to_config(architecture, **special, torch_dtype="bfloat16", dtype="bfloat16")
        (directory / "config.json").write_text(json.dumps(config))
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return weights

    return write


def _random(source: Any, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(source.stored_shape) / math.sqrt(max(source.shape[-1], 16))).to(dtype)


def kept(source: dict[str, torch.Tensor], target: Path, config: Path) -> dict[str, torch.Tensor]:
    """The published tensors: names, shapes and dtypes are the source's, and so are the fields of config.json."""
    found = load_file(target / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in source.items()} == {
        n: (t.shape, t.dtype) for n, t in found.items() if n in source
    }
    given, written = (json.loads((place / "config.json").read_text()) for place in (config, target))
    for field in given.keys() - {"architectures", "pad_token_id", "text_config"}:
        assert written[field] == given[field], field
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_policy_of_every_family(size, world, make, rlhf, tmp_path, capsys):
    weights = make(size, tmp_path / "source")
    target = tmp_path / "target"
    reward = f"py:{world.root}/distinct.py:distinct"
    code = rlhf(
        "ppo", reward=reward, source=tmp_path / "source", prompts=world.prompts, target=target, steps=1,
        max_new_tokens=2, learning_rate=1e-3, micro_batch_size=2, rollout_batch_size=2, global_batch_size=2, precision="fp32",
    )  # fmt: skip
    error = capsys.readouterr().err
    if FAMILY[size].remote:
        assert code == 2
        assert error.count("\n") == 1
        assert "transformers has no class for it" in error or "is no causal language model" in error
        assert not target.exists()
        return
    assert code == 0, error
    found = kept(weights, target, tmp_path / "source")
    assert found.keys() == weights.keys()
    aside = json.loads((target / "manifest.json").read_text())["facts"]["tensors_unchanged"]
    assert all(torch.equal(found[name], weights[name]) for name in aside)
    changed = {name for name in weights if not torch.equal(found[name], weights[name])}
    assert changed, "trained"
    assert bool(aside) == bool(registry.sizes()[size].mtp), aside


# One of each kind of head: plain, with a scale, a cap, a bias, a projection in front.
HEADS = ("tiny", "granite-tiny", "cohere-tiny", "cohere2-tiny", "gemma2-tiny", "gptj-tiny", "mpt-tiny", "opt-350m-tiny")


@pytest.mark.parametrize("size", HEADS)
def test_trls_output_layer_knows_every_head(size, make, tmp_path):
    """The check that `rlhf dpo` makes on its first batch."""
    make(size, tmp_path)
    source = open_source(tmp_path)
    policy = load_policy(source, torch.float32)
    collator = DataCollatorForPreference(pad_token_id=source.pad_id)
    add_fused_lm_head(policy)
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 1], "rejected_ids": [11, 1]}]
    check_fused_log_probs(policy, collator(rows))


REWARDS = [name for name in SIZES if not FAMILY[name].remote and name == _first(name)]
NO_CLASSIFIER = [
    name for name in REWARDS if FAMILY[name].model_types[0] not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
]


@pytest.mark.parametrize("size", REWARDS)
def test_a_reward_model_of_every_family(size, world, make, rlhf, tmp_path, capsys):
    """Without training, which takes seconds; for three kinds with it, and for families that are refused."""
    weights = make(size, tmp_path / "source")
    (tmp_path / "pairs.jsonl").write_text("".join(world.pairs.read_text().splitlines(keepends=True)[:2]))
    target = tmp_path / "target"
    if size in (*NO_CLASSIFIER, "deepseek-v3-tiny", "bloom-tiny", "gemma3-images-tiny"):
        code = rlhf(
            "reward", source=tmp_path / "source", data=tmp_path / "pairs.jsonl", target=target, epochs=1,
            validation_fraction=0, micro_batch_size=2, global_batch_size=2, learning_rate=1e-3, precision="fp32",
        )  # fmt: skip
        error = capsys.readouterr().err
        if size in NO_CLASSIFIER:
            assert code == 2
            assert error.count("\n") == 1
            assert "transformers has no sequence classifier" in error
            assert not target.exists()
            return
        assert code == 0, error
    else:
        source = open_source(tmp_path / "source", classifier=True)
        target.mkdir()
        save_hf(new_reward_model(source, seed=0), target, source, classifier=True)
    head = {name for name in weights if name.startswith(("lm_head.", "embed_out."))}
    found = kept({n: t for n, t in weights.items() if n not in head}, target, tmp_path / "source")
    assert len(found.keys() - weights.keys()) == 1  # the new head
    load_reward_model(target, torch.float32)
    load_critic(target, torch.float32, vocab_size=open_source(tmp_path / "source").vocab_size)
