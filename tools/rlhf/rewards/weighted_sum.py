"""The reward: a weighted sum of reward models and Python functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.checkpoint.directory.open import open_checkpoint
from shared.data.tokenizer import open_tokenizer
from tools.rlhf.data import Prompt
from tools.rlhf.rewards.python_function import FunctionReward
from tools.rlhf.rewards.reward_model import ModelReward, load_reward_model
from tools.rlhf.rewards.spec import RewardSpec
from tools.rlhf.rollout.rollout import Reply
from tools.rlhf.transformers_model import context_length


class Scorer(Protocol):
    """A component of the reward: one number per reply, NaN for no opinion."""

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[float]: ...


class Reward:
    """The weighted sum of the components of `--reward`."""

    def __init__(self, components: Sequence[tuple[RewardSpec, Scorer]]) -> None:
        self.components = tuple(components)

    @property
    def names(self) -> tuple[str, ...]:
        """Component names, in the order of `--reward`."""
        return tuple(spec.name for spec, _ in self.components)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The reward models among the components."""
        return tuple(scorer.model for _, scorer in self.components if isinstance(scorer, ModelReward))

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sums [B], and unweighted scores [B] by component name; float32 on the CPU.

        As in TRL, the sum leaves out a component without an opinion (NaN); it is NaN where none has one.
        """
        scores = {
            spec.name: torch.tensor(scorer(prompts, replies), dtype=torch.float32) for spec, scorer in self.components
        }
        parts = torch.stack([spec.weight * scores[spec.name] for spec, _ in self.components])
        return parts.nansum(0).masked_fill(parts.isnan().all(0), torch.nan), scores


def load(
    specs: Sequence[RewardSpec],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    timeout: float,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
) -> Reward:
    """Load the components of `--reward`.

    Args:
        specs: result of `spec.parse`.
        tokenizer: the policy's; a reward model with an equal one uses the policy's token ids.
        prompts: the run's; every component is checked against them.
        device: device of reward models.
        dtype: dtype of reward models' weights.
        batch_size: replies per forward pass.
        timeout: limit of a Python function's call, seconds.
        wrap: prepares a reward model for distributed evaluation.
    """
    components: list[tuple[RewardSpec, Scorer]] = []
    for spec in specs:
        if spec.function is not None:
            function = FunctionReward(spec.path, spec.function, seconds=timeout)
            function.check(prompts)
            components.append((spec, function))
            continue
        open_checkpoint(spec.path, kinds=("hf",), flag="--reward")
        model = load_reward_model(spec.path, dtype)
        own = open_tokenizer(spec.path, flag="--reward")
        scorer = ModelReward(
            spec.path,
            wrap(model.to(device)),
            own,
            tokenizer,
            context=context_length(model.config, own),
            device=device,
            batch_size=batch_size,
        )
        scorer.check(prompts)
        components.append((spec, scorer))
    return Reward(components)
