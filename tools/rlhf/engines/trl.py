"""What `reward` and `grpo` share: transformers' Trainer held to the contract of a stage.

The Trainer keeps its checkpoints in TARGET.state/trainer. It writes them in place, so one cut short by a kill looks like
a whole one: a marker, written after everything of the checkpoint is on the disk, tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from shared.checkpoint.files import remove_tree, sync, sync_tree
from shared.console import log
from shared.errors import Interrupted, StageError
from shared.precision import TrainingPrecision
from shared.report.metrics import Metrics, peak_memory
from shared.runtime.agreement import on_first_rank
from shared.runtime.stop_request import StopRequest
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.run_context import RunContext

_MARKER = "complete"
_CHECKPOINT = "checkpoint-"


def resume_point(context: RunContext) -> Path | None:
    """The newest complete checkpoint of the Trainer; incomplete ones are removed."""

    def newest() -> Path | None:
        context.state.create()
        folder = context.state.path / "trainer"
        for path in folder.glob(f"{_CHECKPOINT}*"):
            if not (path / _MARKER).exists():
                remove_tree(path)
                log(f"removed {path.name}, whose saving was cut short")
        return max(folder.glob(f"{_CHECKPOINT}*"), key=_step_of, default=None)

    resumed = on_first_rank(newest)
    if resumed is not None:
        log(f"resuming after update {_step_of(resumed)}")
    return resumed


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_CHECKPOINT))


def common_arguments(
    context: RunContext,
    distributed: DistributedContext,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    max_gradient_norm: float,
    precision: TrainingPrecision,
    seed: int,
    save_every: int,
) -> dict[str, Any]:
    """Arguments of a Trainer that every command sets alike. Batch sizes are known to divide each other."""
    return {
        "output_dir": str(context.state.path / "trainer"),
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * distributed.world_size),
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": max_gradient_norm,
        "bf16": precision == "bf16",
        "use_cpu": distributed.device.type == "cpu",
        "gradient_checkpointing": False,
        "seed": seed,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide what must stop the run
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": distributed.device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "ddp_backend": None if distributed.device.type == "cuda" else "gloo",
    }


class Contract(TrainerCallback):
    """Metrics, log lines, whole checkpoints, stopping on a signal and on a loss that is not finite."""

    def __init__(
        self,
        context: RunContext,
        distributed: DistributedContext,
        *,
        resumed: Path | None,
        log_every: int,
        line: Callable[[Mapping[str, float]], str],
        period: int = 1,
    ) -> None:
        """
        Args:
            context: the run.
            distributed: this process's place.
            resumed: the checkpoint that training goes on from.
            log_every: updates between two log lines.
            line: a log line's text from an update's metrics.
            period: updates between two points at which a checkpoint holds everything that a resumed run needs.
        """
        self.interrupted_at: int | None = None
        self._period = period
        self._distributed, self._log_every, self._line = distributed, log_every, line
        self._stop = StopRequest()
        step = _step_of(resumed) if resumed else None
        self._metrics = Metrics(context.state.path, resumed_step=step) if distributed.rank == 0 else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        between = state.global_step == state.max_steps or state.global_step % self._period
        if not between and self._stop.agreed(self._distributed.device):
            self.interrupted_at = state.global_step
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        # TRL counts num_tokens from the last start on, not over the run.
        row = {name: float(value) for name, value in logs.items() if name not in ("total_flos", "step", "num_tokens")}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise StageError(
                    f"{name} is {row[name]} at update {state.global_step}; nothing is published. Lower --learning-rate"
                )
        if self._metrics is not None:
            self._metrics.append(step=state.global_step, **row, peak_memory_bytes=peak_memory())
        if state.global_step % self._log_every == 0 or state.global_step == state.max_steps:
            log(f"update {state.global_step}/{state.max_steps}: {self._line(row)}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._distributed.barrier()  # every rank writes its generator state
        if self._metrics is not None:
            self._metrics.sync()
            place = Path(args.output_dir) / f"{_CHECKPOINT}{state.global_step}"
            sync_tree(place)
            (place / _MARKER).touch()
            sync(place)

    def finish(self, max_steps: int) -> None:
        """Call after training: closes the metrics; raises Interrupted if a signal ended it early."""
        if self._metrics is not None:
            self._metrics.close()
        if self.interrupted_at is not None:
            raise Interrupted(
                f"stopped by a signal after update {self.interrupted_at} of {max_steps}; run the same command to go on"
            )


def train(trainer: Any, contract: Contract, resumed: Path | None) -> None:
    """Run the Trainer to its end, from a checkpoint if there is one; raises Interrupted if a signal stopped it."""
    trainer.remove_callback(PrinterCallback)  # a line per update on stdout, which is for results
    trainer.add_callback(contract)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    contract.finish(trainer.state.max_steps)


def unwrapped(trainer: Any) -> torch.nn.Module:
    """The trained model without the wrappers of distributed training, on the CPU."""
    return trainer.accelerator.unwrap_model(trainer.model).to("cpu")
