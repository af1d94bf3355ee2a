"""Families against transformers: configurations, names and shapes of every tensor, at real sizes, without weights."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.mapping.account import account_sources
from shared.model.architecture import Architecture


class Tensor:
    place = "header"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def transformers_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Name and shape of every weight that transformers saves for this configuration: built without storage."""
    import torch
    import transformers

    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind.from_dict(dict(config)))
    found = {name: Tensor(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del found["lm_head.weight"]
    return found


# As published, in the spelling they were published in.
LLAMA_3_1_8B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256}"""
QWEN3_8B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
"initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
"model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936}"""
QWEN2_5_0_5B = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
"vocab_size": 151936}"""
LLAMA_7B = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_position_embeddings": 2048,
"max_sequence_length": null, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
"pad_token_id": 0, "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0",
"use_cache": true, "vocab_size": 32000, "tie_word_embeddings": false}"""
CODE_LLAMA_34B = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 22016, "max_position_embeddings": 16384,
"model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 48, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 1000000,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.32.0.dev0", "use_cache": true,
"vocab_size": 32000}"""
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA_3_1_8B, 8_030_261_248),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
    "Qwen2.5-0.5B": (QWEN2_5_0_5B, 494_032_768),
    "LLaMA-7B": (LLAMA_7B, 6_738_415_616),
    "CodeLlama-34B": (CODE_LLAMA_34B, 33_743_970_304),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_model_is_accounted_for(name: str) -> None:
    config = json.loads(PUBLISHED[name][0])
    architecture = registry.from_config(config)
    found = transformers_tensors(config)
    account = account_sources(registry.table_of(architecture), found, name)
    assert sum(len(entry.sources) for entry in account.entries) == len(found)
    count = sum(math.prod(tensor.shape) for tensor in found.values())
    assert count == architecture.parameter_count() == PUBLISHED[name][1]


@pytest.mark.parametrize("size", ["tiny", "qwen2-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_biases_are_where_transformers_has_them(size: str, changes: dict[str, Any]) -> None:
    config = registry.to_config(registry.sizes()[size])
    config |= {name: value for name, value in changes.items() if name in config}
    table = registry.table_of(registry.from_config(config))
    account_sources(table, transformers_tensors(config), size)


def test_facts_of_published_models() -> None:
    llama, qwen = (registry.from_config(json.loads(text)) for text in (LLAMA_3_1_8B, QWEN3_8B))
    assert llama == registry.sizes()["llama-3.1-8b"]
    assert qwen == registry.sizes()["qwen3-8b"]
    assert registry.from_config(json.loads(QWEN2_5_0_5B)) == registry.sizes()["qwen2.5-0.5b"]
    old = registry.from_config(json.loads(LLAMA_7B))
    assert (old.num_query_groups, old.head_dim, old.rope_theta) == (32, 128, 10_000.0)
    assert registry.from_config(json.loads(CODE_LLAMA_34B)).rope_theta == 1_000_000.0


@pytest.mark.parametrize("size", registry.sizes())
def test_configuration_both_ways(size: str) -> None:
    architecture = registry.sizes()[size]
    assert registry.from_config(json.loads(json.dumps(registry.to_config(architecture)))) == architecture


@pytest.mark.parametrize("size", registry.sizes())
def test_configuration_as_transformers_5_rewrites_it(size: str) -> None:
    from transformers import CONFIG_MAPPING

    architecture: Architecture = registry.sizes()[size]
    config = registry.to_config(architecture)
    rewritten = CONFIG_MAPPING[architecture.family].from_dict(config).to_dict()
    assert registry.from_config(rewritten) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"head_dim": 17}, "even head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = registry.to_config(registry.sizes()["qwen3-tiny"])
    with pytest.raises(UserError, match=message):
        registry.from_config(config | changes)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'qwen3_moe' is not a supported family; the nearest is qwen3 "):
        registry.family_of({"model_type": "qwen3_moe"})
