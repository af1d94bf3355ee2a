"""`rlhf kto`: Kahneman-Tversky optimisation by TRL's KTOTrainer (arXiv:2402.01306, equations 7 and 8).

With r = log(policy / source) of a reply and z an estimate of KL(policy || source), the loss is
w+ (1 - sigmoid(beta (r - z))) of a desirable reply and w- (1 - sigmoid(beta (z - r))) of another. z is the mean of r over
replies that belong to other prompts of the micro-batch, at least 0, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.rlhf.algorithms.preference_training import Algorithm, Row, train_and_publish
from tools.rlhf.data import LabelledReply, read_labelled_replies
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.held_out import HeldOut, hold_out, whole_micro_batches
from tools.rlhf.models import Source, open_source
from tools.rlhf.options import KTOOptions
from tools.rlhf.run_context import open_training


def run(options: KTOOptions) -> None:
    """Train and publish a policy."""
    distributed = initialize_distributed()
    with open_training(options, distributed) as context:
        source = open_source(options.source)
        replies = _replies(options, source, distributed.world_size)
        rows = HeldOut(
            train=with_others_replies(replies.train, options.micro_batch_size),
            validation=with_others_replies(replies.validation, options.micro_batch_size),
            dropped=replies.dropped,
        )
        algorithm = _algorithm(options, replies.train)
        train_and_publish(algorithm, options, source, rows, context, distributed)


def _replies(options: KTOOptions, source: Source, world_size: int) -> HeldOut[LabelledReply]:
    length = options.length_within(source.context_length)
    read, dropped = read_labelled_replies(
        options.data, source.tokenizer, max_length=length, context_length=source.context_length
    )
    replies = hold_out(read, options, dropped=dropped, what="replies")
    # A last micro-batch of one reply would have no other one.
    return whole_micro_batches(replies, options.micro_batch_size, world_size)


def with_others_replies(replies: Sequence[LabelledReply], micro_batch_size: int) -> list[Row]:
    """Rows of TRL's trainer, each with the reply before it in its micro-batch; the first one's is the last."""
    rows: list[Row] = []
    for start in range(0, len(replies), micro_batch_size):
        batch = replies[start : start + micro_batch_size]
        for place, each in enumerate(batch):
            ids = {"prompt_ids": list(each.prompt), "completion_ids": list(each.reply), "label": each.label}
            rows.append(ids | {"KL_completion_ids": list(batch[place - 1].reply)})
    return rows


def _algorithm(options: KTOOptions, replies: Sequence[LabelledReply]) -> Algorithm:
    from trl import KTOConfig

    from tools.rlhf.engines.preference_trainers import OwnTokensKTOTrainer

    desirable = sum(each.label for each in replies)
    return Algorithm(
        name="KTO",
        rows="replies",
        trainer=OwnTokensKTOTrainer,
        config=KTOConfig,
        settings={
            "beta": options.beta,
            "desirable_weight": options.desirable_weight,
            "undesirable_weight": options.undesirable_weight,
            "train_sampling_strategy": "sequential",
        },
        line=_line,
        charts={
            "KL from the source, nats a reply": ("kl",),
            "Log-probability of a reply, nats": ("logps/chosen", "logps/rejected"),
        },
        plan=(
            f"labels    {desirable} desirable with weight {options.desirable_weight:g}, {len(replies) - desirable} undesirable "
            f"with weight {options.undesirable_weight:g}; beta {options.beta:g}",
        ),
    )


def _line(row: Mapping[str, float]) -> str:
    shown = [f"loss {row['loss']:.4f}", f"KL {row['kl']:.3f}"]
    named = {"desirable": "rewards/chosen", "undesirable": "rewards/rejected"}
    return ", ".join([*shown, *(f"{name} {row[key]:.3f}" for name, key in named.items() if key in row)])
