"""DeepSpeed and the process group, on GPUs and on machines without one.

Why this file exists: DeepSpeed's CPU accelerator compiles C++ ops at first use, for minutes and with a compiler that an
image need not have. None of them is needed: `torch_adam` takes torch's own AdamW (fused on CUDA), and with the
shared-memory communication op taken out of the compatible ops before the process group is made, collectives run on gloo.
Both are settings that DeepSpeed reads, not changes to it.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.precision import TrainingPrecision
from tools.rlhf.engines.distributed import DistributedContext


def prepare() -> DistributedContext:
    """Join the process group (torchrun's environment, or a group of one) and make DeepSpeed ready."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    quieten()
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)
    return DistributedContext(device=device, rank=dist.get_rank(), world_size=dist.get_world_size())


def quieten() -> None:
    """Keep the libraries' progress bars and deprecation notes of calls that are not ours out of the log."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a path that is not there must not become a download
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in (r"torch\.distributed", r"transformers\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine trains."""

    zero: int
    """ZeRO stage: what is sharded over the ranks (1 optimizer state, 2 and gradients, 3 and parameters)."""
    precision: TrainingPrecision
    """Of weights and activations; with bf16 the optimizer keeps float32 masters."""
    micro_batch_size: int
    """Replies a forward pass, on one rank."""
    accumulation: int
    """Micro-batches an update."""
    max_gradient_norm: float
    """Gradients are scaled down to this global norm."""


def train_engine(model: nn.Module, options: EngineOptions, *, learning_rate: float) -> Any:
    """A DeepSpeed engine with AdamW (betas 0.9 and 0.95, no weight decay) on this rank's device."""
    adam = {
        "lr": learning_rate,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "torch_adam": True,
        "fused": torch.cuda.is_available(),
    }
    config = _config(options, options.zero) | {"optimizer": {"type": "AdamW", "params": adam}}
    return _initialize(model, config)


def frozen_engine(model: nn.Module, options: EngineOptions) -> Any:
    """An engine without an optimizer; its parameters are sharded when the trained models' are (stage 3)."""
    model.requires_grad_(False)
    return _initialize(model, _config(options, 3 if options.zero == 3 else 0))


def _config(options: EngineOptions, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.max_gradient_norm,
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1 << 40,
    }


def _initialize(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    # Evaluation mode for good: dropout would make the trainer's log-probabilities differ from the roll-out's.
    engine.eval()
    return engine


def full_weights(engine: Any, distributed: DistributedContext) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, whole, on the CPU of rank 0; an empty dict on the others.

    Under ZeRO-3 one parameter at a time is gathered, so no rank ever holds the whole model on its device.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    persistent = set(engine.module.state_dict(keep_vars=True)) if distributed.rank == 0 else set()
    for name, tensor in [*engine.module.named_parameters(), *engine.module.named_buffers()]:
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if name in persistent:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights
