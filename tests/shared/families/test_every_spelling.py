"""Legacy config.json files, as first released and still mirrored: read like the current ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.families import registry


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(Path(__file__).with_name("published").joinpath(f"{name}.json").read_text())[
        "config"
    ]
    return config


_FALCON: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
}
_FALCON_7B = _FALCON | {
    **{"hidden_size": 4544, "model_type": "RefinedWebModel", "multi_query": True, "n_head": 71, "n_layer": 32}
}
_FALCON_40B = _FALCON | {
    **{"hidden_size": 8192, "model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60}
}
_FALCON_RW = _FALCON | {
    **{"alibi": True, "bias": True, "hidden_size": 2048, "model_type": "RefinedWebModel", "multi_query": False},
    **{"n_head": 32, "n_layer": 24, "parallel_attn": False, "vocab_size": 50304},
}
_LLAMA = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_QWEN = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_pdrop": 0.0,
    "bf16": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 151643,
    "embd_pdrop": 0.0,
    "eos_token_id": 151643,
    "ffn_hidden_size": 22016,
    "fp16": False,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 6144,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "resid_pdrop": 0.1,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("first", "name", "changes"),
    [
        (_FALCON_7B, "falcon-7b", {}),
        (_FALCON_40B, "falcon-40b", {}),
        (_FALCON_40B | {"new_decoder_architecture": True, "num_kv_heads": 8}, "falcon-40b", {}),
        (_FALCON_RW, "falcon-rw-1b", {}),
        (_LLAMA, "LLaMA-7B", {}),
        (_LLAMA | {"max_position_embeddings": 2048}, "LLaMA-7B", {}),
        (_LLAMA | {"dtype": "float16"}, "LLaMA-7B", {}),
        (_QWEN, "Qwen-7B", {"max_position_embeddings": 2048}),  # the model was trained further since
        (_QWEN | {"model_type": "qwen"}, "Qwen-7B", {"max_position_embeddings": 2048}),
        (
            {name: value for name, value in _QWEN.items() if name not in ("use_dynamic_ntk", "use_logn_attn")},
            "Qwen-7B",
            {"max_position_embeddings": 6144},  # both were off unless said, in the code of that time
        ),
    ],
)
def test_first_uploads_are_the_models_of_today(first: dict[str, Any], name: str, changes: dict[str, Any]) -> None:
    assert registry.from_config(first) == replace(registry.from_config(published(name)), **changes)


def test_stablelm_epoch() -> None:
    """As StableLM 2 1.6B came out; its file of today renames three fields."""
    config = published("stablelm-2-1_6b")
    first = {name: value for name, value in config.items() if name not in ("layer_norm_eps", "partial_rotary_factor")}
    first |= {
        "architectures": ["StableLMEpochForCausalLM"],
        "model_type": "stablelm_epoch",
        "rotary_scaling_factor": 1.0,
    }
    first |= {"norm_eps": config["layer_norm_eps"], "rope_pct": config["partial_rotary_factor"], "num_heads": 32}
    assert registry.from_config(first) == registry.from_config(config)
    assert registry.from_config(first | {"norm_eps": 0.5}).layers[0].norm.epsilon == 0.5
    assert registry.from_config(first | {"rope_pct": 0.5}).attention.rotary_dim == 32


def test_longrope_by_its_first_name() -> None:
    from transformers import CONFIG_MAPPING

    config = published("Phi-3.5-mini-instruct")
    first = config | {"rope_scaling": config["rope_scaling"] | {"type": "su"}}
    assert registry.from_config(first) == registry.from_config(config)
    length = {
        "original_max_position_embeddings": config["original_max_position_embeddings"]
    }  # it looks there alone for su
    theirs = CONFIG_MAPPING["phi3"].from_dict({**first, "rope_scaling": first["rope_scaling"] | length})
    assert theirs.rope_parameters["rope_type"] == "longrope"
    both = first | {"rope_scaling": first["rope_scaling"] | {"rope_type": "longrope"}}  # as transformers saves it again
    assert registry.from_config(both) == registry.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            _LLAMA | {"max_position_embeddings": 4096},
            "max_sequence_length 2048 contradicts max_position_embeddings 4096",
        ),
        (_FALCON_7B | {"num_attention_heads": 64}, "n_head 71 contradicts num_attention_heads 64"),
        (_QWEN | {"padded_vocab_size": 152064}, "padded_vocab_size = 152064 is not supported"),
        (_QWEN | {"pos_emb": "learned"}, "pos_emb = 'learned' is not supported"),
        (_QWEN | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (_QWEN | {"architectures": ["QWenForVision"]}, "model_type is missing"),
        (published("Phi-3.5-mini-instruct") | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn lacks"),
    ],
)
def test_what_cannot_be_read_right_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.from_config(config)


# As a release of transformers that wrote everything it knew of wrote it; found in files of Kimi K2, among others.
_ALL = {
    **{
        "bad_words_ids": None,
        "begin_suppress_tokens": None,
        "cross_attention_hidden_size": None,
        "diversity_penalty": 0.0,
    },
    **{"do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "length_penalty": 1.0},
    **{"max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1},
    **{"num_return_sequences": 1, "output_scores": False, "pruned_heads": {}, "repetition_penalty": 1.0},
    **{"temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False, "top_k": 50, "top_p": 1.0},
    **{"typical_p": 1.0, "add_cross_attention": False, "exponential_decay_length_penalty": None},
}


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("Kimi-K2-Instruct", _ALL),
        ("gpt2", _ALL | {"_num_labels": 1}),  # distilgpt2
        ("pythia-1.4b", {"custom_pipelines": {"text-generation": {"impl": "a.b", "pt": "c"}}}),  # Dolly
        ("Llama-2-7b-hf", {"_flash_attn_2_enabled": True}),
    ],
)
def test_fields_that_change_nothing(name: str, further: dict[str, Any]) -> None:
    config = published(name)
    assert registry.from_config(config | further) == registry.from_config(config)


def test_heads_that_were_pruned_are_refused() -> None:
    with pytest.raises(UserError, match="pruned_heads = {'0': \\[1\\]}"):
        registry.from_config(published("gpt2") | {"pruned_heads": {"0": [1]}})


def test_yarn_of_models_whose_code_says_more() -> None:
    """Yarn-Llama-2: transformers passes over the flag, too."""
    yarn = {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"}
    config = published("Llama-2-7b-hf")
    plain = registry.from_config(config | {"rope_scaling": yarn})
    assert registry.from_config(config | {"rope_scaling": yarn | {"finetuned": True}}) == plain


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-30B-A3B"])
def test_models_end_where_dual_chunk_attention_begins(name: str) -> None:
    config = published(name) | {"max_position_embeddings": 1_010_000}
    chunks = {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}
    found = registry.from_config(config | {"dual_chunk_attention_config": chunks})
    assert found == replace(registry.from_config(config), max_position_embeddings=262_144 - 8192)


@pytest.mark.parametrize(
    ("field", "value"), [("use_qk_norm", False), ("shared_expert_intermediate_size", 8), ("qkv_bias", True)]
)
def test_what_qwen3_coder_says_is_so(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        registry.from_config(published("Qwen3-Coder-30B-A3B-Instruct") | {field: value})
