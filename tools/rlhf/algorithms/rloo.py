"""`rlhf rloo`: REINFORCE with the other replies as baseline, by TRL's RLOOTrainer (arXiv:2402.14740, equation 10).

The advantage of a reply is its reward minus the mean reward of the prompt's other replies; it is not divided by a deviation.
The reward has the KL penalty in it. The loss is PPO's clipped one, with the ratio of whole replies.
"""

from __future__ import annotations

from tools.rlhf.algorithms.group_training import Algorithm, train_and_publish
from tools.rlhf.options import RLOOOptions


def run(options: RLOOOptions) -> None:
    """Train and publish a policy."""
    train_and_publish(options, lambda: algorithm(options))


def algorithm(options: RLOOOptions) -> Algorithm:
    """RLOO with the options' clip range."""
    from trl import RLOOConfig

    from tools.rlhf.engines.group_trainers import CheckedRLOOTrainer

    return Algorithm(
        name="RLOO",
        trainer=CheckedRLOOTrainer,
        config=RLOOConfig,
        settings={"epsilon": options.clip_range},
        plan=f"loss      of whole replies, clipped at {options.clip_range:g}; KL coefficient {options.kl_coefficient:g}",
    )
