"""Flags of `rlhf ppo` as trlx's and accelerate's settings. No import of either."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from shared.errors import UserError
from shared.precision import TrainingPrecision
from tools.rlhf.ppo_options import PPOOptions

_NEVER = 1 << 60

# Fields of the options that the loop, the sampler or trlx honours. What is not here is refused: a new flag is not ignored.
_HONOURED = """
source target overwrite prompts reward reward_timeout backend processes seed track
steps rollout_batch_size epochs global_batch_size micro_batch_size save_every log_every
hang_timeout max_new_tokens temperature rollout_micro_batch_size
rollouts publish_by policies rollout_key_file rollout_timeout log_prob_gap_limit
validation_prompts evaluate_every keep_best missing_eos_penalty normalise_rewards reward_clip
learning_rate warmup_steps max_gradient_norm precision zero gradient_checkpointing clip_range value_clip_range
lora_rank lora_alpha lora_targets rslora publish
kl_coefficient kl_estimator kl_target kl_horizon discount gae_lambda whiten_advantages
"""
_REASONS = {
    "critic": "its critic is a value head on the policy's states",
    "critic_learning_rate": "policy and value head have one optimizer",
    "importance_correction": "its loss has no weights of tokens",
    "shared_critic": "its critic is a value head on the policy's states always",
}


def check(options: PPOOptions) -> None:
    """UserError for a flag that trlx cannot honour."""
    honoured = _HONOURED.split()
    for field in fields(options):
        if field.name not in honoured and getattr(options, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            reason = _REASONS.get(field.name, "its trainer has nothing for it")
            raise UserError(
                f"{flag} does not go with --backend trlx: {reason}; leave it out, or use --backend deepspeed"
            )


@dataclass(frozen=True, kw_only=True)
class TrlxSettings:
    """What trlx and accelerate are told."""

    epochs: int
    """Passes over the replies of an iteration."""
    batch_size: int
    """Replies of an update, on one process."""
    micro_batch_size: int
    """Replies of a forward pass, on one process."""
    temperature: float
    clip_range: float
    value_clip_range: float
    discount: float
    gae_lambda: float
    whiten_advantages: bool
    max_gradient_norm: float
    zero: int
    precision: TrainingPrecision
    seed: int
    source: str
    """The source's directory, where trlx reads a tokenizer that is not used."""

    @classmethod
    def of(cls, options: PPOOptions, *, precision: TrainingPrecision, world_size: int) -> Self:
        """Those of a command on `world_size` processes."""
        return cls(
            epochs=options.epochs,
            batch_size=options.global_batch_size // world_size,
            micro_batch_size=options.micro_batch_size,
            temperature=options.temperature,
            clip_range=options.clip_range,
            value_clip_range=options.value_clip_range,
            discount=options.discount,
            gae_lambda=options.gae_lambda,
            whiten_advantages=options.whiten_advantages,
            max_gradient_norm=options.max_gradient_norm,
            zero=options.zero,
            precision=precision,
            seed=options.seed,
            source=str(options.source),
        )

    def sections(self) -> dict[str, dict[str, Any]]:
        """Fields of trlx's TRLConfig, by section. One call of `learn` is one epoch of trlx: nothing is saved or sampled by it."""
        return {
            "train": {
                "epochs": 1,
                "total_steps": _NEVER,
                "batch_size": self.batch_size,
                "minibatch_size": self.micro_batch_size,
                "checkpoint_interval": _NEVER,
                "eval_interval": _NEVER,
                "save_best": False,
                "tracker": None,
                "seed": self.seed,
            },
            "model": {"model_path": self.source, "num_layers_unfrozen": -1},
            "tokenizer": {"tokenizer_path": self.source},
            "optimizer": {
                "name": "adamw",
                "kwargs": {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
            },
            "method": {
                "ppo_epochs": self.epochs,
                "cliprange": self.clip_range,
                "cliprange_value": self.value_clip_range,
                "gamma": self.discount,
                "lam": self.gae_lambda,
                "vf_coef": 1.0,
                "target": None,  # the KL coefficient is ours
            },
        }

    def environment(self, *, cpu: bool) -> dict[str, str]:
        """Variables that accelerate reads: trlx makes its Accelerator without arguments."""
        micro_batches = str(self.batch_size // self.micro_batch_size)
        found = {
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": micro_batches,
            "ACCELERATE_MIXED_PRECISION": "bf16" if self.precision == "bf16" else "no",
        }
        if self.zero:
            return found | {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(self.zero),
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",  # models are whole when they are handed over
                "ACCELERATE_GRADIENT_CLIPPING": str(self.max_gradient_norm),
            }
        return found | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
