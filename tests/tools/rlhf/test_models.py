"""Loaded models: every tensor is accounted for; the critic's head has the width of the body's output."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from shared.errors import UserError
from tools.rlhf.algorithms.reward import new_reward_model
from tools.rlhf.models import keep_in_evaluation_mode, load_critic, load_policy, open_source
from tools.rlhf.rewards.reward_model import load_reward_model
from tools.rlhf.transformers_model import context_length

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
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
CUT = {"policy": "model.layers.0.mlp.up_proj.weight", "gpt2": "h.0.mlp.c_fc.weight"}
CUT["reward"] = CUT["policy"]


def _write(directory: Path, kind: str) -> dict[str, torch.Tensor]:
    """A model as published: GPT-2's names are without the body's prefix."""
    llama = transformers.LlamaConfig(**LLAMA, num_labels=1, pad_token_id=0)
    made = {
        "policy": lambda: transformers.LlamaForCausalLM(llama),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "reward": lambda: transformers.LlamaForSequenceClassification(llama),
    }
    made[kind]().save_pretrained(directory)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "red": 2}, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


def _loaders(directory: Path, kind: str) -> list[Callable[[], Any]]:
    """Every way a command opens a directory of this kind."""
    if kind == "reward":
        return [
            lambda: load_reward_model(directory, torch.float32),
            lambda: load_critic(directory, torch.float32, vocab_size=32),
        ]
    return [
        lambda: load_policy(open_source(directory), torch.float32),
        lambda: new_reward_model(open_source(directory, classifier=True), 0),
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


@pytest.mark.parametrize("kind", ["policy", "gpt2", "reward"])
@pytest.mark.parametrize("fault", ["none", "is missing", "is unknown to", "config.json asks for"])
def test_every_tensor_is_accounted_for(tmp_path: Path, kind: str, fault: str, reports: list[logging.LogRecord]) -> None:
    weights = _write(tmp_path, kind)
    name = CUT[kind]
    if fault == "is missing":
        del weights[name]
    elif fault == "config.json asks for":
        weights[name] = weights[name][1:].contiguous()
    elif fault == "is unknown to":
        name = name.replace("mlp.", "mlp.other.")
        weights[name] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in _loaders(tmp_path, kind):
        if fault == "none":
            load()
            continue
        with pytest.raises(UserError, match=f"^[^\\n]*{name}[^\\n]*{fault}[^\\n]*$"):
            load()
        assert not reports  # the error is the one line


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize(
    ("quantised", "why"), [(True, r"quantised \(FP8.*convert to-hf"), (False, "no weight is quantised")]
)
def test_quantised_weights_are_refused(tmp_path: Path, kind: str, quantised: bool, why: str) -> None:
    weights = _write(tmp_path, kind)
    if quantised:
        name = CUT[kind]
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in _loaders(tmp_path, kind):
        with pytest.raises(UserError, match=f"^[^\\n]*{why}[^\\n]*$"):
            load()


def test_a_tied_embedding_is_missing_under_its_own_name(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is missing"):
        load_critic(tmp_path, torch.float32, vocab_size=32)


@pytest.mark.parametrize(("fields", "context"), [({"max_seq_len": 24}, 24), ({}, 64)])
def test_the_context_is_the_configs_or_the_tokenizers(fields: dict[str, int], context: int) -> None:
    config = transformers.MptConfig(**fields) if fields else transformers.BloomConfig()
    assert context_length(config, transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0})), model_max_length=64
    )) == context  # fmt: skip


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    weights = _write(tmp_path, "reward")
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
