"""`rlhf grpo`: group relative policy optimisation by TRL's GRPOTrainer.

Advantages are relative to a prompt's replies, as in the GRPO paper (arXiv:2402.03300). With A the advantage, r the probability
ratio to the sampling policy and e `--clip-range`, a token's loss is -min(r A, clip(r, 1 - e, 1 + e) A). `--loss` says what it is
divided by:

dapo      the tokens of all replies of the update: TRL's default, not the GRPO paper's                  arXiv:2503.14476
grpo      the tokens of its reply, then the number of replies                                           arXiv:2402.03300
bnpo      the tokens of its micro-batch
dr_grpo   the number of replies times `--max-new-tokens`                                                arXiv:2503.20783
cispo     as dapo, of the loss -min(r, 1 + e) A log(policy), without a gradient through the minimum     arXiv:2506.13585
"""

from __future__ import annotations

from tools.rlhf.algorithms.group_training import Algorithm, train_and_publish
from tools.rlhf.options import GRPOOptions


def run(options: GRPOOptions) -> None:
    """Train and publish a policy."""
    train_and_publish(options, lambda: algorithm(options))


def algorithm(options: GRPOOptions) -> Algorithm:
    """GRPO with the options' loss and normalisation."""
    from trl import GRPOConfig

    from tools.rlhf.engines.group_trainers import CheckedGRPOTrainer, Importance

    bound = 1 + options.clip_range if options.loss == "cispo" else None  # TRL's bound of CISPO is of the ratio itself
    importance = (
        {"importance": Importance(correction=options.importance_correction, cap=options.importance_cap)}
        if options.importance_correction != "none"
        else {}
    )
    plan = f"loss      {options.loss}; rewards {options.reward_normalisation}, scaled by {options.scale_rewards}"
    if importance:
        plan += f"; importance correction {options.importance_correction}, cap {options.importance_cap:g}"
    return Algorithm(
        name="GRPO",
        trainer=CheckedGRPOTrainer,
        config=GRPOConfig,
        settings={
            "epsilon": options.clip_range,
            "epsilon_high": bound,
            "loss_type": options.loss,
            "multi_objective_aggregation": options.reward_normalisation,
            "scale_rewards": options.scale_rewards,
        },
        plan=plan,
        arguments=importance,
    )
