"""Environment variables of torch, vLLM and lm-evaluation-harness, set before their import."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def on_gpu() -> bool:
    """Whether torch can use a GPU of this machine."""
    import torch

    return torch.cuda.is_available()


def prepare_environment() -> None:
    """Set the environment variables of torch, vLLM and the hub. Variables set by the user keep their values."""
    _silence_libraries()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # vLLM forks: counting GPUs must not initialise CUDA
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a checkpoint directory is complete; the hub is not needed
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns about the fork of the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu() else "ERROR")  # on CPU it warns of our settings
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if on_gpu():
        return
    # vLLM compiles a few helpers on first use even with enforce_eager: 20 s for the first log-probability.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # By default engine and model run in separate processes; each imports torch and vLLM again.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # By default vLLM pins threads to all cores but one, which starves other processes on a shared machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _silence_libraries() -> None:
    """Silence warnings about optional dependencies that are not installed (CUDA, Triton) and about our own settings."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log file
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # bars that ignore TQDM_DISABLE: one line a minute
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    for name in ("torch.utils.flop_counter", "torch.utils.cpp_extension", "torch._library.triton", "lm_eval.api.task"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
