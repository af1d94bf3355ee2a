"""Options of `rlhf ppo`. Imports neither torch nor a library of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import Existing, ExistingDir, NonNegative, Positive
from shared.errors import UserError
from tools.rlhf.options import CAP, Above, Fraction, ImportanceCorrection, PolicyOptions, Rate, check_cap

RewardNormalisation = Literal["none", "scale", "standardise"]


@dataclass(frozen=True, kw_only=True)
class PPOOptions(PolicyOptions):
    """`rlhf ppo`.

    Attributes:
        source: the Hugging Face directory of the initial policy; also the frozen reference of the KL penalty.
        backend: what makes the updates: our loop on DeepSpeed engines, or trlx's trainer. README.md says how to get trlx.
        critic: the directory of the initial critic; by default the first reward model, else the policy.
        steps: iterations of roll-out and update.
        rollout_batch_size: replies per iteration, over all processes.
        epochs: passes over the replies of an iteration.
        learning_rate: of the policy's AdamW, constant after the warm-up.
        critic_learning_rate: of the critic's AdamW; by default the policy's.
        warmup_steps: iterations of linear warm-up of both rates from 0.
        kl_coefficient: weight of the KL penalty per token; the initial one with --kl-target.
        kl_estimator: k1 is log(policy / reference); k3 has the same mean, less variance and is never negative.
        kl_target: KL per reply in nats, to which the coefficient adapts; by default the coefficient is constant.
        value_clip_range: a value is clipped to this distance from the old value.
        discount: gamma of the returns.
        gae_lambda: lambda of generalized advantage estimation.
        whiten_advantages: scale advantages to mean 0 and variance 1 over the iteration's tokens.
        missing_eos_penalty: subtracted from the reward of a reply without an EOS within --max-new-tokens.
        zero: ZeRO stage; 1 shards optimizer state over processes, 2 also gradients, 3 also parameters.
        precision: of weights and activations; by default bf16 on a GPU and fp32 elsewhere.
        kl_horizon: iterations in which a KL of twice --kl-target would multiply the coefficient by e, were its error not clipped
            to 0.2.
        update_kl_limit: nats a token by which a mini-batch's policy may be away from the one that sampled; above it, no update of
            the iteration follows. By default all epochs are made.
        critic_warmup_steps: first iterations in which the critic is trained and the policy is not.
        entropy_coefficient: weight of the policy's entropy, nats a token, which the loss rewards.
        normalise_rewards: scale divides a reply's reward by the deviation of all rewards so far, standardise subtracts their
            mean before.
        reward_clip: rewards are clipped to this distance from 0, after --normalise-rewards.
        pretraining_data: a dataset of `pretrain prepare`, or rows with text, in a file or a folder of files: every update also
            lowers the policy's loss on as many rows of it as there are replies.
        pretraining_coefficient: weight of that loss, nats a token; by default 1.
        pretraining_length: tokens of a row; by default 512, or the model's context.
        shared_critic: the critic is a linear head on the policy's body instead of a model of its own.
        value_coefficient: weight of the value loss beside the policy's, with --shared-critic; by default 0.1.
        importance_correction: weight of a token in the policy's loss, from the ratio of trainer to sampler: capped, or the ratio
            within the bounds and 0 beyond, of a token or of its whole reply. README.md has the formulas and papers.
        importance_cap: the largest ratio; the smallest of the masks is its inverse.
    """

    backend: Literal["deepspeed", "trlx"] = "deepspeed"
    critic: ExistingDir | None = None
    rollout_batch_size: Positive = 64
    epochs: Positive = 2
    critic_learning_rate: Rate | None = None
    kl_coefficient: Rate = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: Above | None = None
    value_clip_range: Above = 0.2
    discount: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: Rate = 0.0
    kl_horizon: Annotated[float, Field(ge=1)] | None = None
    update_kl_limit: Above | None = None
    critic_warmup_steps: NonNegative = 0
    entropy_coefficient: Rate = 0.0
    normalise_rewards: RewardNormalisation = "none"
    reward_clip: Above | None = None
    pretraining_data: Existing | None = None
    pretraining_coefficient: Above | None = None
    pretraining_length: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None
    shared_critic: bool = False
    value_coefficient: Above | None = None
    importance_correction: ImportanceCorrection = "none"
    importance_cap: Annotated[float, Field(gt=1)] = CAP

    def __post_init__(self) -> None:
        """As in `PolicyOptions`; also, a cap and a horizon are given where they act, and the policy is trained."""
        super().__post_init__()
        if self.kl_horizon is not None and self.kl_target is None:
            raise UserError("--kl-horizon is of the coefficient that adapts to --kl-target; give both, or neither")
        if self.pretraining_data is None:
            for flag, given in (
                ("--pretraining-coefficient", self.pretraining_coefficient),
                ("--pretraining-length", self.pretraining_length),
            ):
                if given is not None:
                    raise UserError(f"{flag} is of --pretraining-data; give both, or neither")
        if self.value_coefficient is not None and not self.shared_critic:
            raise UserError("--value-coefficient is of --shared-critic; give both, or neither")
        if self.shared_critic:
            for flag, value in (
                ("--critic", self.critic),
                ("--critic-learning-rate", self.critic_learning_rate),
                ("--critic-warmup-steps", self.critic_warmup_steps or None),
            ):
                if value is not None:
                    raise UserError(f"{flag} is of a critic with a body of its own; leave it or --shared-critic out")
        if self.critic_warmup_steps >= self.steps:
            raise UserError(
                f"--critic-warmup-steps {self.critic_warmup_steps} leaves none of --steps {self.steps} to train the policy in; "
                "lower it"
            )
        check_cap(self.importance_correction, self.importance_cap)

    def check(self, world_size: int) -> None:
        """As in `Options`; also, rollout_batch_size must be a multiple of global_batch_size."""
        super().check(world_size)
        if self.rollout_batch_size % self.global_batch_size:
            raise UserError(
                f"--rollout-batch-size {self.rollout_batch_size} is not a multiple of --global-batch-size "
                f"{self.global_batch_size}"
            )

    @property
    def inputs(self) -> dict[str, Path | list[Path]]:
        """Input files and directories."""
        return (
            super().inputs
            | ({"critic": self.critic} if self.critic else {})
            | ({"pretraining_data": self.pretraining_data} if self.pretraining_data else {})
        )

    @property
    def critic_path(self) -> Path:
        """The initial critic: --critic, else the first reward model, else the policy."""
        models = [spec.path for spec in self.rewards if spec.function is None]
        return self.critic or (models[0] if models else self.source)
