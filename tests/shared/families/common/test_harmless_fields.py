"""Fields that change nothing pass, whatever the tool that wrote them; fields that could change the result do not."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.families.common.harmless_fields import harmless

# As found in published config.json files.
HARMLESS: dict[str, Any] = {
    "_model_name_or_path": "org/model",
    "_name_or_path": "/data/run-3/checkpoint",
    "_commit_hash": "f00d",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "_num_labels": 2,
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    "badwordsids": [[3]],
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.14",
    "unsloth_training_precision": "bfloat16",
    "mergekit_version": "0.1",
    "transformers_version": "5.0.0",
    "base_model_name": "org/base",
    "tokenizer_class": "LlamaTokenizer",
    "tokenizer_path": "tokenizer.model",
    "torch_dtype": "bfloat16",
    "dtype": "float32",
    "use_flash_attention_2": True,
    "attn_implementation": "sdpa",
    "experts_implementation": "grouped_mm",
    "fuse_cross_entropy": True,
    "gradient_checkpointing": True,
    "use_reentrant_checkpointing": True,
    "neftune_noise_alpha": 5.0,
    "tensor_parallel_size": 8,
    "ep_size": 4,
    "base_model_tp_plan": {"layers.*.mlp": "colwise"},
    "cache_implementation": "hybrid",
    "min_p": 0.1,
    "max_new_tokens": 512,
    "renormalize_logits": True,
    "image_token_id": 9,
    "image_token_index": 9,
    "resid_pdrop": 0.1,
    "hidden_dropout_prob": 0.1,
    "classifier_dropout": 0.1,
    "layerdrop": 0.05,
    "num_parameters": 7_000_000_000,
}
# As found too, and each of them another computation or other weights.
DECISIVE: dict[str, Any] = {
    "logit_scale": 0.0625,
    "final_logit_softcapping": 30.0,
    "rope_interleaved": True,
    "rope_version": "v2",
    "use_parallel_residual": True,
    "activation": "swiglu",
    "residual_multiplier": 0.2,
    "embedding_multiplier": 12.0,
    "output_multiplier": 2.0,
    "output_bias": True,
    "num_experts_per_token": 2,
    "moe_topk": 4,
    "attention_sink_size": 4,
    "quantization": {"bits": 4, "group_size": 64},
    "scale_embeddings": True,
    "use_fused_gate_bias": True,
    "attention_chunk_size": 8192,
    "dropout": 1.5,
    "qk_layernorm": True,
}


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_harmless_fields_pass_in_every_family(family: str) -> None:
    size = next(iter(registry.FAMILIES[family].sizes.values()))
    config = registry.to_config(size)
    added = {name: value for name, value in HARMLESS.items() if name not in config}
    read = registry.from_config(config | added)
    # A rate that the family knows is read; the architecture is the same in all else.
    own = {name for name in added if registry.from_config(config | {name: added[name]}) != size}
    assert all("drop" in name for name in own), own
    assert own or read == size


@pytest.mark.parametrize("name", DECISIVE)
def test_fields_that_could_change_the_result_are_refused_with_the_flag(name: str) -> None:
    assert not harmless(name, DECISIVE[name])
    config = registry.to_config(registry.sizes()["tiny"]) | {name: DECISIVE[name]}
    with pytest.raises(UserError, match=f"{name} = .*--ignore-config-field {name}"):
        registry.from_config(config)
    assert registry.from_config(config, [name]) == registry.sizes()["tiny"]


def test_only_unknown_fields_can_be_ignored() -> None:
    config = registry.to_config(registry.sizes()["tiny"])
    with pytest.raises(UserError, match="--ignore-config-field rms_norm_eps: family llama reads it"):
        registry.from_config(config, ["rms_norm_eps"])
    with pytest.raises(UserError, match="--ignore-config-field logit_scale: config.json has no such field"):
        registry.check_ignored(config, ["logit_scale"])


def test_a_field_of_the_language_model_within_a_wrapper() -> None:
    size = next(size for size in registry.sizes().values() if size.vision and size.num_layers < 10)
    config = registry.to_config(size)
    config["text_config"] = config["text_config"] | {"logit_scale": 2.0, "unsloth_fixed": True}
    with pytest.raises(UserError, match="--ignore-config-field text_config.logit_scale"):
        registry.from_config(config)
    registry.check_ignored(config, ["text_config.logit_scale"])
    assert registry.from_config(config, ["text_config.logit_scale"]) == size


def test_dropout_rates_without_a_reader_are_named() -> None:
    config = registry.to_config(registry.sizes()["tiny"])
    assert registry.unread_rates(config | {"attention_dropout": 0.2}) == {}
    assert registry.from_config(config | {"attention_dropout": 0.2}).attention.dropout == 0.2
    assert registry.unread_rates(config | {"resid_pdrop": 0.1, "embd_pdrop": 0.0}) == {"resid_pdrop": 0.1}
