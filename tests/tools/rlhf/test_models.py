"""Loaded models: every tensor is accounted for; the critic's head has the width of the body's output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tools.rlhf.models import keep_in_evaluation_mode, load_critic
from tools.rlhf.rewards.reward_model import load_reward_model
from tools.rlhf.transformers_model import load_transformers_model

OPT = {"ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({"hidden_size": 16, "word_embed_proj_dim": 16}, 16),
        ({"hidden_size": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False}, 8),  # OPT 350M's form
    ],
)
def test_the_head_is_as_wide_as_what_the_body_gives(tmp_path: Path, sizes: dict[str, Any], width: int) -> None:
    config = transformers.OPTConfig(**OPT, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "policy")
    transformers.OPTForSequenceClassification(transformers.OPTConfig(**OPT, **sizes, num_labels=1)).save_pretrained(
        tmp_path / "reward"
    )
    ids = torch.arange(6)[None] + 2
    for name in ("policy", "reward"):
        critic = load_critic(tmp_path / name, torch.float32, vocab_size=32)
        assert critic.head.in_features == width
        values = critic(ids, torch.ones_like(ids), torch.arange(6)[None])
        assert values.shape == (1, 6)
        assert bool(values.any()) == (name == "reward")


LLAMA = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CUT = "model.layers.0.mlp.up_proj.weight"


def _loaders(directory: Path, kind: str) -> list[Callable[[], Any]]:
    """Every way a command loads a directory of this kind."""
    if kind == "reward":
        return [
            lambda: load_reward_model(directory, torch.float32),
            lambda: load_critic(directory, torch.float32, vocab_size=32),
        ]
    causal, classifier = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    return [
        lambda: load_transformers_model(causal, directory, place="--source", dtype=torch.float32),
        lambda: load_transformers_model(classifier, directory, place="--source", other_head=True, num_labels=1),
        lambda: load_critic(directory, torch.float32, vocab_size=32),
    ]


@pytest.fixture
def reports() -> Iterator[list[logging.LogRecord]]:
    """What transformers logs; its logger does not propagate to pytest's."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("fault", ["none", "missing", "no tensor of", "shape"])
def test_every_tensor_is_accounted_for(tmp_path: Path, kind: str, fault: str, reports: list[logging.LogRecord]) -> None:
    config = transformers.LlamaConfig(**LLAMA, num_labels=1, pad_token_id=0)
    made = {"policy": transformers.LlamaForCausalLM, "reward": transformers.LlamaForSequenceClassification}[kind]
    made(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if fault == "missing":
        del weights[CUT]
    elif fault == "shape":
        weights[CUT] = weights[CUT][1:].contiguous()
    elif fault == "no tensor of":
        weights["model.layers.0.mlp.other.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in _loaders(tmp_path, kind):
        if fault == "none":
            load()
            continue
        name = "mlp.other.weight" if fault == "no tensor of" else CUT
        with pytest.raises(UserError, match=f"^--(source|reward model:|critic)[^\\n]*{name}.* {fault}"):
            load()
        assert not reports  # the error is the one line


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA, num_labels=1, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in _loaders(tmp_path, "reward"):
        with pytest.raises(UserError, match=r"score\.weight is missing"):
            load()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_kept_in_evaluation_mode_has_no_dropout(training: bool) -> None:
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0.5))
    keep_in_evaluation_mode(model)
    model.train(training)
    assert model.training == training
    assert not any(module.training for name, module in model.named_modules() if name)
