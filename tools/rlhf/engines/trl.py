"""TRL's trainers for `reward` and `grpo`: arguments, metrics, complete checkpoints, stop requests.

The Trainer writes its checkpoints in place, to TARGET.state/trainer. A marker file, written last, distinguishes complete
checkpoints from interrupted ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from shared.checkpoint.files import remove_tree, sync, sync_tree
from shared.console import log
from shared.errors import Interrupted, StageError
from shared.report.metrics import peak_memory
from shared.runtime import progress
from shared.runtime.agreement import on_rank_0
from shared.runtime.stop_request import StopRequest
from tools.rlhf.engines.deepspeed import check_state, gathered_weights, trainer_config
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.options import Options
from tools.rlhf.run_context import RunContext

_MARKER = "complete"
_CHECKPOINT = "checkpoint-"


def resume_point(context: RunContext) -> Path | None:
    """The Trainer's newest complete checkpoint. Removes incomplete ones."""

    def newest() -> Path | None:
        context.state.create()
        folder = _checkpoints(context)
        for path in folder.glob(f"{_CHECKPOINT}*"):
            if not (path / _MARKER).exists():
                remove_tree(path)
                log(f"removed {path.name}: incomplete, the run was killed while saving it")
        return max(folder.glob(f"{_CHECKPOINT}*"), key=step_of, default=None)

    resumed = on_rank_0(newest)
    if resumed is not None:
        log(f"resuming after update {step_of(resumed)}")
    return resumed


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(_CHECKPOINT))


def common_arguments(context: RunContext, options: Options, distributed: DistributedContext) -> dict[str, Any]:
    """Trainer arguments common to all commands."""
    micro_batches = options.global_batch_size // (options.micro_batch_size * distributed.world_size)
    return {
        "output_dir": str(_checkpoints(context)),
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "learning_rate": options.learning_rate,
        "warmup_steps": options.warmup_steps,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": options.max_gradient_norm,
        "bf16": options.precision_on(distributed.device.type) == "bf16",
        "use_cpu": distributed.device.type == "cpu",
        "gradient_checkpointing": False,  # ours, of layers in evaluation mode
        "seed": options.seed,
        "save_strategy": "steps",
        "save_steps": options.save_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite must stop the run
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": distributed.device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "ddp_backend": None if distributed.device.type == "cuda" or options.zero else "gloo",
        **({"deepspeed": trainer_config(options.zero, options.offload)} if options.zero else {}),
    }


def _checkpoints(context: RunContext) -> Path:
    return context.state.path / "trainer"


class StageCallback(TrainerCallback):
    """Metrics, log lines, complete checkpoints; stops on a signal and on a loss that is not finite."""

    def __init__(
        self,
        context: RunContext,
        options: Options,
        distributed: DistributedContext,
        *,
        resumed: Path | None,
        line: Callable[[Mapping[str, float]], str],
        period: int = 1,
    ) -> None:
        """
        Args:
            context: the run.
            options: the command's: how often to log, and the trackers.
            distributed: the ranks.
            resumed: the checkpoint to resume from.
            line: formats an update's metrics as a log line.
            period: updates per roll-out; a run resumes only at a multiple.
        """
        self.interrupted_at: int | None = None
        self._period = period
        self._distributed, self._log_every, self._line = distributed, options.log_every, line
        self._stop, self._began = StopRequest(), 0.0
        step = step_of(resumed) if resumed else None
        self._metrics = context.state.metrics(step, options.track) if distributed.rank == 0 else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()
        progress.update(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        progress.updated(time.monotonic() - self._began)
        progress.at("recording and saving", long=True, limit=math.inf)
        between = state.global_step == state.max_steps or state.global_step % self._period
        if not between and self._stop.agreed(self._distributed.device):
            self.interrupted_at = state.global_step
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary after training
            return
        # num_tokens is dropped: TRL counts it from the process start, not over the run.
        row = {name: float(value) for name, value in logs.items() if name not in ("total_flos", "step", "num_tokens")}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise StageError(
                    f"{name} is {row[name]} at update {state.global_step}; nothing is published. Lower --learning-rate"
                )
        row = {
            name: value for name, value in row.items() if math.isfinite(value)
        }  # NaN: no reward function had an opinion
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
        """Close the metrics after training. Interrupted if a signal stopped it."""
        if self._metrics is not None:
            self._metrics.close()
        if self.interrupted_at is not None:
            raise Interrupted(
                f"stopped by a signal after update {self.interrupted_at} of {max_steps}; run the same command to resume"
            )


def train(trainer: Any, callback: StageCallback, resumed: Path | None) -> int:
    """Run the Trainer, from a checkpoint if there is one.

    Returns:
        the updates made, those before a resume included.

    Raises:
        UserError: the checkpoint has files that DeepSpeed would run code of.
        Interrupted: a signal stopped it.
        StageError: the Trainer ended before its last update, as it does without a word where its data runs out.
    """
    trainer.remove_callback(PrinterCallback)  # prints every update to stdout, which is for results
    trainer.add_callback(callback)
    if resumed:
        check_state(resumed)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    callback.finish(trainer.state.max_steps)
    made, asked = trainer.state.global_step, trainer.state.max_steps
    if made != asked or asked < 1:
        raise StageError(f"training ended after {made} of {asked} updates; nothing is published")
    return made


class TrainedPolicy:
    """The model of a Trainer, as a `Publisher` takes it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def module(self) -> Any:
        """The transformers model, or PEFT's around it."""
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """See `Policy`."""
        lora = hasattr(self.module, "peft_config")
        return gathered_weights(self.module, torch.distributed.get_rank(), trained_only=lora)
