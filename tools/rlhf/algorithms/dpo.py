"""`rlhf dpo`: direct preference optimisation by TRL's DPOTrainer.

With D = log(policy / source) of the chosen reply minus that of the rejected one, each a sum over the reply's tokens:

sigmoid     -log sigmoid(beta D)                                                            arXiv:2305.18290, equation 7
hinge       max(0, 1 - beta D)                                                              arXiv:2309.06657, section 3.3
ipo         (D' - 1 / (2 beta))^2, D' of means over the tokens                              arXiv:2310.12036, equation 17
robust      (-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e)             arXiv:2403.00409, equation 12
nca_pair, sppo_hard, apo_zero, apo_down: of each side's ratio, not of their difference alone; arXiv:2402.05369, 2405.00675,
2408.06266.
"""

from __future__ import annotations

from collections.abc import Mapping

from tools.rlhf.algorithms.preference_training import Algorithm, Row, train_and_publish
from tools.rlhf.data import read_ranked_replies
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.held_out import HeldOut, hold_out, whole_micro_batches
from tools.rlhf.models import Source, open_source
from tools.rlhf.options import DPOOptions
from tools.rlhf.run_context import open_training


def run(options: DPOOptions) -> None:
    """Train and publish a policy."""
    distributed = initialize_distributed()
    with open_training(options, distributed) as context:
        source = open_source(options.source)
        rows = _rows(options, source, distributed.world_size)
        train_and_publish(_algorithm(options), options, source, rows, context, distributed)


def _rows(options: DPOOptions, source: Source, world_size: int) -> HeldOut[Row]:
    length = options.length_within(source.context_length)
    pairs, dropped = read_ranked_replies(
        options.data, source.tokenizer, max_length=length, context_length=source.context_length
    )
    rows: list[Row] = [
        {"prompt_ids": list(pair.prompt), "chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected)}
        for pair in pairs
    ]
    split = hold_out(rows, options, dropped=dropped, what="pairs")
    return split if world_size == 1 else whole_micro_batches(split, options.micro_batch_size, world_size)


def _algorithm(options: DPOOptions) -> Algorithm:
    from trl import DPOConfig

    from tools.rlhf.engines.preference_trainers import OwnTokensDPOTrainer

    return Algorithm(
        name="DPO",
        rows="pairs",
        trainer=OwnTokensDPOTrainer,
        config=DPOConfig,
        settings={"beta": options.beta, "loss_type": [options.loss], "label_smoothing": options.label_smoothing},
        line=_line,
        charts={
            "Accuracy on training pairs": ("rewards/accuracies",),
            "Log-probability of a reply, nats": ("logps/chosen", "logps/rejected"),
        },
        plan=(f"loss      {options.loss}, beta {options.beta:g}",),
    )


def _line(row: Mapping[str, float]) -> str:
    return (
        f"loss {row['loss']:.4f}, accuracy {row['rewards/accuracies']:.3f}, margin {row['rewards/margins']:.3f}, "
        f"log-probability of the chosen reply {row['logps/chosen']:.1f}"
    )
