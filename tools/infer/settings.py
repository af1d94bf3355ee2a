"""How vLLM is set up: what is chosen for a machine without a GPU, and why, is all here.

Nothing heavy is imported at the top: vLLM and torch read their environment variables as they are imported, so
`prepare_environment` comes first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from shared.console import log
from shared.errors import UserError
from shared.families import registry

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CPU_SEQUENCES = 32  # at once; more only lengthens every step on a handful of cores
_CPU_CACHE_SHARE = 0.4  # of the free memory, the most that the key-value cache may take
# Models whose tokens of an image see each other; vLLM's attention on the CPU lets them see those before them only.
_SEE_EACH_OTHER = {"gemma3"}
_BLOCK = 128  # tokens; vLLM's block size on CPU, the unit in which a sequence takes cache


def on_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def prepare_environment() -> None:
    """Set the environment variables of torch, vLLM and the hub. What the user has set stays."""
    _quieten()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not start CUDA: vLLM forks
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a directory is complete; nothing is to be asked of a model hub
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns about the fork of the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu() else "ERROR")  # on CPU it warns of what is meant
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if on_gpu():
        return
    # A few helpers of vLLM are compiled on first use whatever enforce_eager says: 20 s for the first log-probability.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # Without it the engine runs in a process of its own and the model in a third; each imports torch and vLLM anew.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Pins one thread to each core but one. Right for a machine of our own, ruinous where cores are shared.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _quieten() -> None:
    """Leave out what libraries say of parts absent on purpose (CUDA, Triton) and of defaults taken on purpose."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which fill a log file
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # those that insist: first and last, or every minute
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    for name in ("torch.utils.flop_counter", "torch.utils.cpp_extension", "torch._library.triton", "lm_eval.api.task"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def engine_arguments(
    source: Path,
    *,
    precision: str | None,
    max_model_len: int | None,
    tensor_parallel: int,
    batch_size: int | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` and `vllm.EngineArgs` that suit this machine.

    Raises:
        UserError: it has fewer devices than are asked for, or too little memory for one context.
    """
    arguments: dict[str, Any] = {
        "model": str(source),
        "dtype": DTYPES[precision] if precision else "auto",
        "tensor_parallel_size": tensor_parallel,
        "seed": seed,
        "use_tqdm_on_load": False,
    }
    if max_model_len is not None:
        arguments["max_model_len"] = max_model_len
    if batch_size is not None:
        arguments["max_num_seqs"] = batch_size
    if on_gpu():
        import torch

        if tensor_parallel > torch.cuda.device_count():
            raise UserError(f"--tensor-parallel {tensor_parallel}: this machine has {torch.cuda.device_count()} GPUs")
        return arguments
    if tensor_parallel != 1:
        # vLLM's CPU workers return wrong tokens here, and one process uses every core already.
        raise UserError(
            f"--tensor-parallel {tensor_parallel}: this machine has no GPU to share a model among; leave it out"
        )
    sequences = batch_size or _CPU_SEQUENCES
    config = read_config(source)
    if config.get("model_type") in _SEE_EACH_OTHER:
        log(
            "images are not taken: vLLM on CPU would answer otherwise than the model does; text is computed as on a GPU"
        )
        arguments["limit_mm_per_prompt"] = {"image": 0}
    if "kv_lora_rank" in config:
        # The fused operator turns the one rotated key of latent attention wrongly, without a word; vLLM's plain one does not.
        arguments["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    return arguments | {
        "max_num_seqs": sequences,
        "enforce_eager": True,  # torch.compile takes minutes on CPU and there are no CUDA graphs to win
        "kv_cache_memory_bytes": cpu_cache_bytes(config, max_model_len, sequences, precision),
    }


def read_config(source: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--source {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--source {path} holds no configuration")
    return config


def cpu_cache_bytes(config: Mapping[str, Any], max_model_len: int | None, sequences: int, precision: str | None) -> int:
    """Bytes of key-value cache: enough for `sequences` full contexts, within a share of the free memory.

    vLLM's default on CPU is 92% of all memory, touched at once: too slow and too much for a machine that does other
    things. Errs on the large side for models that share or compress their cache.
    """
    dtype = DTYPES[precision] if precision else str(config.get("dtype") or config.get("torch_dtype"))
    config = registry.language_config(config)
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    groups = config.get("num_key_value_heads") or heads
    layers = config.get("num_hidden_layers", 32)
    width = 4 if "32" in dtype else 2
    context = max_model_len or config.get("max_position_embeddings") or 2048
    blocks = -(-context // _BLOCK) + 2  # one that vLLM keeps for itself, one more where a window begins within a block
    per_sequence = 2 * width * layers * groups * head_dim * blocks * _BLOCK
    if "linear_key_head_dim" in config:  # states of delta nets, and vLLM makes every block at least as large as one
        state = config["linear_num_value_heads"] * config["linear_key_head_dim"] * config["linear_value_head_dim"]
        per_sequence += 4 * layers * 4 * state
    available = int(psutil.virtual_memory().available * _CPU_CACHE_SHARE)
    if per_sequence > available:
        raise UserError(
            f"--max-model-len: one context of {context} tokens needs {per_sequence / 2**30:.1f} GiB of cache and "
            f"{available / 2**30:.1f} GiB may be taken here; give a shorter one"
        )
    return min(per_sequence * sequences, available)
