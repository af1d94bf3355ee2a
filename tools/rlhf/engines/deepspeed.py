"""DeepSpeed: process group, trained models, frozen models; on GPU and CPU.

DeepSpeed's CPU accelerator compiles C++ ops at first use: minutes, and a compiler is required. Two settings avoid that:
`torch_adam` selects torch's AdamW (fused on CUDA); without the shared-memory op among the compatible ops, collectives use
gloo.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.errors import UserError
from shared.precision import TrainingPrecision
from shared.runtime.world import join_world
from tools.rlhf.engines.distributed import DistributedContext

USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # the variable by which accelerate is told


def initialize_distributed() -> DistributedContext:
    """Initialise DeepSpeed and the process group, from torchrun's environment or for one process."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    silence_libraries()
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    join_world()
    deepspeed.init_distributed(verbose=False)
    return DistributedContext(device=device, rank=dist.get_rank(), world_size=dist.get_world_size())


def silence_libraries() -> None:
    """Silence progress bars, and deprecation warnings inside libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for module in (r"torch\.distributed", r"transformers\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine trains."""

    zero: int
    """ZeRO stage. Sharded over the ranks: 1 optimizer state, 2 also gradients, 3 also parameters."""
    precision: TrainingPrecision
    """Precision of weights and activations; with bf16 the optimizer has float32 main weights."""
    micro_batch_size: int
    """Replies per forward pass of a rank."""
    accumulation: int
    """Micro-batches per update and rank."""
    max_gradient_norm: float
    """Gradients are clipped to this global norm."""
    offload: bool = False
    """Whether what ZeRO shards is in the host's memory."""


class DeepSpeedEngine:
    """The `Engine` on DeepSpeed: AdamW (betas 0.9 and 0.95, no weight decay), ZeRO 0 to 3."""

    def __init__(self, model: nn.Module, options: EngineOptions, distributed: DistributedContext) -> None:
        adam = {
            "lr": 0.0,  # set before every update
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "torch_adam": True,
            "fused": torch.cuda.is_available() and not options.offload,
        }
        config = _config(options, options.zero) | {"optimizer": {"type": "AdamW", "params": adam}}
        self._trained_only = trains_part(model)
        self._engine = _initialize(model, config)
        self._rank = distributed.rank
        self._scale = options.accumulation * distributed.world_size

    @property
    def module(self) -> Any:
        """The transformers model or critic."""
        return self._engine.module

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. DeepSpeed averages over micro-batches and ranks; the scale makes it a sum."""
        self._engine.backward(loss * self._scale)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self) -> None:
        """See `Engine`."""
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """See `Engine`. DeepSpeed has no norm for float32 at ZeRO stage 0."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def set_learning_rate(self, rate: float) -> None:
        """See `Engine`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def full_weights(self) -> dict[str, Tensor]:
        """See `Engine`. ZeRO-3 gathers one parameter at a time: no device holds the full model. Frozen ones are left out."""
        return gathered_weights(self._engine.module, self._rank, trained_only=self._trained_only)

    def save(self, directory: Path) -> None:
        """See `Engine`."""
        save_engine(self._engine, directory, trained_only=self._trained_only)

    def load(self, directory: Path) -> None:
        """See `Engine`."""
        load_engine(self._engine, directory, trained_only=self._trained_only)


def trains_part(module: nn.Module) -> bool:
    """Whether a part of the module is frozen, as with LoRA."""
    return not all(parameter.requires_grad for parameter in module.parameters())


def save_engine(engine: Any, directory: Path, *, trained_only: bool) -> None:
    """Write model and optimizer of DeepSpeed's engine; every rank writes its shard.

    Args:
        engine: of `deepspeed.initialize`.
        directory: where to write.
        trained_only: without what is frozen.
    """
    engine.save_checkpoint(
        str(directory.parent), tag=directory.name, save_latest=False, exclude_frozen_parameters=trained_only
    )


def load_engine(engine: Any, directory: Path, *, trained_only: bool) -> None:
    """Read what `save_engine` wrote, with the same number of ranks.

    Raises:
        UserError: a file is damaged, or holds more than this state does.
    """
    check_state(directory)
    engine.load_checkpoint(str(directory.parent), tag=directory.name, load_module_strict=not trained_only)


def check_state(directory: Path) -> None:
    """Check that reading DeepSpeed's files runs no code: DeepSpeed unpickles whatever they hold.

    Raises:
        UserError: a file holds more than tensors, plain values and three classes of DeepSpeed, or is damaged.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    for path in sorted(directory.rglob("*_states.pt")):
        try:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # mapped: tensors are not read
        except (pickle.UnpicklingError, RuntimeError) as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if "GLOBAL" in line), lines[0]).strip()
            raise UserError(
                f"{path} is no file that this state was saved with, or is damaged ({reason}); start anew with --overwrite"
            ) from None


def gathered_weights(module: nn.Module, rank: int, *, trained_only: bool = False) -> dict[str, Tensor]:
    """The unsharded state dict of a module on the CPU of rank 0; empty on other ranks. Every rank calls it.

    Args:
        module: the module.
        rank: of this process.
        trained_only: without what is frozen.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    persistent = set(module.state_dict(keep_vars=True)) if rank == 0 else set()
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in [(n, t) for n, t in named if t.requires_grad or not trained_only]:
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if name in persistent:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def zero_config(stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`: the stage, and whether its states are in the host's memory.

    DeepSpeed's own AdamW for CPUs is compiled at first use; torch's does without a compiler, which is asked for by name.
    """
    if not offload:
        return {"zero_optimization": {"stage": stage}}
    held = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    states = {"offload_optimizer": held} | ({"offload_param": held} if stage == 3 else {})
    return {"zero_optimization": {"stage": stage, **states}, "zero_force_ds_cpu_optimizer": False}


def trainer_config(zero: int, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed's part of a transformers Trainer's arguments: ZeRO, torch's AdamW. The Trainer fills in what is `auto`."""
    os.environ[USE_DEEPSPEED] = "true"
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": adam | {"fused": torch.cuda.is_available() and not offload}},
        "steps_per_print": 1 << 40,
        **zero_config(zero, offload),
    }


def frozen_model(model: nn.Module, options: EngineOptions) -> Any:
    """A model without an optimizer; parameters are sharded if the trained models' are (ZeRO-3)."""
    model.requires_grad_(False)
    return _initialize(model, _config(replace(options, offload=False), 3 if options.zero == 3 else 0))


def _config(options: EngineOptions, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.max_gradient_norm,
        "bf16": {"enabled": options.precision == "bf16"},
        "steps_per_print": 1 << 40,
        **zero_config(stage, options.offload),
    }


def _initialize(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # else stage 0 takes all
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained or None, config=config, dist_init_required=False
    )
    # Evaluation mode: with dropout, trainer and sampler log-probabilities would differ.
    engine.eval()
    return engine
