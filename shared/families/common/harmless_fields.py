"""Fields of config.json that change no output of the model, by name and by kind."""

from __future__ import annotations

import re
from typing import Any

# Tokenizer, labels, and bookkeeping of transformers.
_HARMLESS = """
    _from_model_config _num_labels
    architectures auto_map bos_token_id chunk_size_feed_forward custom_pipelines
    eos_token_id finetuning_task id2label is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id
    model_type num_labels output_attentions output_hidden_states output_router_logits pad_token_id prefix
    problem_type return_dict return_dict_in_generate sep_token_id task_specific_params
    torchscript use_bfloat16 use_cache use_return_dict
"""
# Generation settings, which transformers before 4.39 wrote to config.json, too.
_GENERATION = """
    bad_words_id bad_words_ids begin_suppress_tokens cache_implementation compile_config constraints disable_compile
    diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id
    generation_config guidance_scale length_penalty low_memory max_cache_len max_length max_matching_ngram_size
    max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits repetition_penalty sequence_bias stop_strings suppress_tokens temperature
    token_healing top_h top_k top_p typical_p watermarking_config
"""
# Kinds: a whole name matches. A name that could be part of the computation (`use_parallel_residual`) must match none.
_KINDS = (
    # where the model is from, and what made it
    r"_?(base_|original_|parent_)?(model_)?name(_or_path)?",
    r"\w+_(path|dir|directory|revision|commit|url)",
    r"_?(commit|git|config)_(hash|sha)",
    r"(?!(rope|rotary|attn|attention|norm|mlp|moe)_)(\w+_)?version",
    r"license|author|authors|description|language|tags|created|created_at|date|timestamp|(num|total)_param(eter)?s",
    # settings of other programs
    r"transformers\.js_config",
    r"(unsloth|onnx|openvino|neuron|vllm|sglang|tensorrt|trt|mlx|gguf|ggml|deepspeed|fsdp|accelerate|mergekit|axolotl"
    r"|llamafactory|llama_factory|liger|xla|ipex|optimum|coreml|exllama|wandb|trl|ray|sagemaker|azureml)(_\w+)?",
    r"tokenizer_\w+|model_max_length",
    # number types, kernels, devices and parallel layouts of a run
    r"((torch|params|compute|master|autocast|kv_cache|cache)_)?dtype|bf16|fp16|fp32|mixed_precision",
    r"_?(attn|experts)_implementation\w*|_?(use_)?flash_(attn|attention)\w*|use_(sdpa|xformers|triton|cudnn|kernels?)",
    r"(use_)?fused?_(cross_entropy|linear_cross_entropy|norm|rms_norm|layer_norm|rope|rotary_emb|swiglu|mlp|qkv|adamw?)",
    r"use_memory_efficient_attention|use_liger_kernel|use_cuda_graphs?|use_torch_compile|device|device_map|low_cpu_mem_usage",
    r"((tensor|pipeline|expert|context|sequence|data)_(model_)?parallel(_size)?|(tp|pp|ep|cp|dp)_size|pretraining_tp"
    r"|base_model_(tp|pp|ep)_plan|tp_plan|ep_plan|pp_plan)",
    r"(use_|enable_)?gradient_checkpointing\w*|(use_)?activation_checkpointing\w*|use_reentrant\w*|neftune_noise_alpha",
    # token ids: the tokenizer, masks and image placeholders use them
    r"\w+_token_(ids?|index)",
    r"num_assistant_tokens\w*|assistant_\w+|target_lookbehind",
)
_RATE = re.compile(
    r"(\w+_)?dropout(_p|_prob|_rate|_ratio)?|\w+_pdrop|(\w+_)?drop_(path_)?rate|(\w+_)?layer_?drop|\w+_jitter_noise"
)
_NAMES = frozenset(_HARMLESS.split() + _GENERATION.split())
_WITHOUT_UNDERSCORES = {name.replace("_", "") for name in _NAMES if len(name) > 8}  # `badwordsids`
_KIND = re.compile("|".join(f"(?:{kind})" for kind in _KINDS))


def harmless(name: str, value: Any) -> bool:
    """Whether a field that a family does not read changes nothing: by its name, or because it says nothing."""
    if value in (None, {}, []) or value is False:
        return True
    known = name in _NAMES or name.lower() in _WITHOUT_UNDERSCORES
    return known or _KIND.fullmatch(name) is not None or is_rate(name, value)


def is_rate(name: str, value: Any) -> bool:
    """Whether a field is a dropout rate or noise of training: without effect on a model that is not trained."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _RATE.fullmatch(name) is not None and number and 0 <= value < 1
