"""vLLM's arguments for this machine. CPU settings are here and in tools/infer/environment.py only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.console import log
from shared.errors import UserError
from shared.families import registry
from shared.precision import DTYPES, Precision
from tools.infer.engines.checkpoint_precision import chosen_precision
from tools.infer.engines.engine import EngineSettings
from tools.infer.environment import on_gpu

_CPU_SEQUENCES = 32  # per step; a larger batch has no higher throughput on few cores
_CPU_CACHE_SHARE = 0.4  # maximum share of free memory for the KV cache
# Models with bidirectional attention within an image; vLLM's CPU attention is causal only.
_BIDIRECTIONAL_IMAGES = {"gemma3"}
# Arguments without which answers are wrong, where `engine_arguments` has them.
REQUIRED = {"limit_mm_per_prompt", "compilation_config"}
_BLOCK = 128  # tokens: vLLM's KV cache block on CPU


def engine_arguments(source: Path, settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` and `vllm.EngineArgs` for this machine.

    Raises:
        UserError: the machine has fewer GPUs than --tensor-parallel, or too little memory for one context.
    """
    tensor_parallel = settings.tensor_parallel
    precision = chosen_precision(source, settings.precision)
    arguments: dict[str, Any] = {
        "model": str(source),
        "dtype": DTYPES[precision],
        "tensor_parallel_size": tensor_parallel,
        "seed": settings.seed,
        "use_tqdm_on_load": False,
    }
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.batch_size is not None:
        arguments["max_num_seqs"] = settings.batch_size
    if on_gpu():
        import torch

        if tensor_parallel > torch.cuda.device_count():
            raise UserError(f"--tensor-parallel {tensor_parallel}: this machine has {torch.cuda.device_count()} GPUs")
        return arguments
    if tensor_parallel != 1:
        # vLLM's CPU workers return wrong tokens here; one process uses all cores anyway
        raise UserError(
            f"--tensor-parallel {tensor_parallel}: this machine has no GPU to share a model among; leave it out"
        )
    config = read_config(source / "config.json")
    if config.get("model_type") in _BIDIRECTIONAL_IMAGES:
        log(
            "images are refused: vLLM's CPU attention is causal within an image, the model's is bidirectional; text is unaffected"
        )
        arguments["limit_mm_per_prompt"] = {"image": 0}
    if "kv_lora_rank" in config:
        # vLLM's fused rotary operator is wrong for MLA's shared key; the unfused one is right
        arguments["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    sequences = settings.batch_size or _CPU_SEQUENCES
    return arguments | {
        "max_num_seqs": sequences,
        "enforce_eager": True,  # torch.compile takes minutes on CPU; there are no CUDA graphs
        "kv_cache_memory_bytes": cpu_cache_bytes(config, settings.max_model_len, sequences, precision),
    }


def cpu_cache_bytes(config: Mapping[str, Any], max_model_len: int | None, sequences: int, precision: Precision) -> int:
    """Bytes of KV cache on CPU: `sequences` full contexts, at most `_CPU_CACHE_SHARE` of the free memory.

    vLLM's default is 92% of all memory, allocated at the start: slow, and too much for a shared machine. For MLA and sliding
    windows the size is an upper bound.
    """
    config = registry.language_config(config)
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    groups = config.get("num_key_value_heads") or heads
    layers = config.get("num_hidden_layers", 32)
    width = 4 if precision == "fp32" else 2
    context = max_model_len or config.get("max_position_embeddings") or 2048
    blocks = -(-context // _BLOCK) + 2  # + vLLM's null block + a partial block of a sliding window
    per_sequence = 2 * width * layers * groups * head_dim * blocks * _BLOCK
    if "linear_key_head_dim" in config:  # gated delta net: a block holds at least one recurrent state
        state = config["linear_num_value_heads"] * config["linear_key_head_dim"] * config["linear_value_head_dim"]
        per_sequence += 4 * layers * 4 * state
    available = int(psutil.virtual_memory().available * _CPU_CACHE_SHARE)
    if per_sequence > available:
        raise UserError(
            f"--max-model-len: the KV cache of one context of {context} tokens takes {per_sequence / 2**30:.1f} GiB, the limit "
            f"here is {available / 2**30:.1f} GiB; give a shorter context"
        )
    return min(per_sequence * sequences, available)
