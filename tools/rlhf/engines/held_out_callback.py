"""Answers held-out prompts during a run of one of TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tools.rlhf.held_out_prompts import HeldOutPrompts


class HeldOutCallback(TrainerCallback):
    """Answers the prompts where they are due; the numbers go into the trainer's metrics of that update."""

    def __init__(self, trainer: Any, held_out: HeldOutPrompts, resumed: int | None) -> None:
        """`resumed`: the update that the run resumes from."""
        self._trainer, self._held_out, self._resumed = trainer, held_out, resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._held_out.begin(self._resumed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._held_out.due(state.global_step):
            for name, value in self._held_out.evaluate(state.global_step).items():
                self._trainer._metrics["train"][name].append(value)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._held_out.saved(state.global_step)
