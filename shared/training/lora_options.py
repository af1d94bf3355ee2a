"""What the options of LoRA mean. Standard library and pydantic only."""

from __future__ import annotations

from dataclasses import replace

from shared.errors import UserError
from shared.mapping.adapters import ALL_LINEAR, LoraSettings
from shared.training.config import MTP_LOSS_SCALING_FACTOR
from shared.training.options import TrainingOptions


def has_lora(options: TrainingOptions) -> bool:
    """Whether adapters are trained instead of weights."""
    return options.lora_rank is not None or options.adapter is not None


def lora_settings(options: TrainingOptions, adapter: LoraSettings | None = None) -> LoraSettings | None:
    """The adapters to train; None without `--lora-rank` and `--adapter`.

    Args:
        options: of the command.
        adapter: settings of `options.adapter`.

    Raises:
        UserError: an option belongs to LoRA, to a training of weights, or is said by the adapter.
    """
    shape: dict[str, object] = {
        "--lora-alpha": options.lora_alpha,
        "--lora-targets": options.lora_targets,
        "--rslora": options.rslora or None,
    }
    others: dict[str, object] = {
        "--lora-dropout": options.lora_dropout,
        "--lora-weight-decay": options.lora_weight_decay,
    }
    if not has_lora(options):
        refuse_without_rank(shape | others)
        return None
    if options.backend == "te":
        raise UserError(
            "--backend te: its modules join the norm with the linear layer that an adapter needs apart; leave it out"
        )
    if options.mtp_loss_scaling_factor:
        raise UserError(
            "--mtp-loss-scaling-factor: the MTP (multi-token prediction) layers are not run with LoRA; leave it out"
        )
    if options.weight_decay != type(options).weight_decay:
        raise UserError(
            "--weight-decay is of the model's weights, which LoRA does not train; give --lora-weight-decay for its A and B"
        )
    if adapter is not None:
        if flag := _given({"--lora-rank": options.lora_rank} | shape):
            raise UserError(f"{flag}: --adapter {options.adapter} says rank, alpha and targets; leave it out")
        return adapter if options.lora_dropout is None else replace(adapter, dropout=options.lora_dropout)
    assert options.lora_rank is not None
    return settings_of_flags(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        targets=options.lora_targets,
        dropout=options.lora_dropout,
        rslora=options.rslora,
    )


def settings_of_flags(
    *, rank: int, alpha: float | None, targets: tuple[str, ...] | None, dropout: float | None, rslora: bool
) -> LoraSettings:
    """The adapters that the flags of these names ask for; None: by default."""
    return LoraSettings(
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        rslora=rslora,
        dropout=dropout or 0.0,
        targets=targets or (ALL_LINEAR,),
    )


def refuse_without_rank(values: dict[str, object]) -> None:
    """UserError for a flag with a value, where no --lora-rank is given."""
    if flag := _given(values):
        raise UserError(f"{flag} belongs to LoRA; give --lora-rank, or leave it out")


def _given(values: dict[str, object]) -> str | None:
    """The first flag with a value."""
    return next((flag for flag, value in values.items() if value is not None), None)


def weight_decay(options: TrainingOptions) -> float:
    """Of what is trained: weights, or adapters."""
    return options.lora_weight_decay or 0.0 if has_lora(options) else options.weight_decay


def mtp_loss_scaling_factor(options: TrainingOptions) -> float:
    """LoRA has none: transformers' classes, for which adapters are published, lack the MTP layers."""
    if has_lora(options):
        return 0.0
    return MTP_LOSS_SCALING_FACTOR if options.mtp_loss_scaling_factor is None else options.mtp_loss_scaling_factor
