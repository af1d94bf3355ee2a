"""Options of the commands. Imports neither torch nor a library of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from shared.cli import Existing, ExistingDir, NonNegative, Positive, Seed
from shared.errors import UserError
from shared.precision import TrainingPrecision
from shared.report.track import DEFAULT, Track
from shared.runtime.progress import HANG_SECONDS
from shared.training.lora_options import refuse_without_rank
from tools.rlhf.rewards.spec import RewardSpec, parse

Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # beyond, logits divided by it overflow or vanish


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command.

    Attributes:
        source: the Hugging Face directory of the initial model.
        target: the directory to publish.
        overwrite: replace the target and its unfinished state.
        global_batch_size: sequences per update, over all processes.
        micro_batch_size: sequences per forward pass of a process.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: steps of linear warm-up from 0.
        max_gradient_norm: gradients are clipped to this norm.
        precision: of the arithmetic; by default bf16 on a GPU and fp32 elsewhere. Main weights are fp32.
        zero: ZeRO stage; 1 shards optimizer state over processes, 2 also gradients, 3 also parameters. With bf16, what is not
            main weights is bf16, from stage 1 on.
        processes: world size; by default the launcher's (torchrun, Slurm), else one process per GPU, at most as many as the
            batch sizes can be divided among, and 1 without GPUs.
        seed: of every random choice.
        save_every: steps between two saves of the state.
        log_every: steps between two log lines; metrics.jsonl has every step.
        track: where the numbers of metrics.jsonl go, too: tensorboard, wandb, mlflow, trackio, separated by commas, or none. All
            write to the target unless their own environment variables name a server.
        gradient_checkpointing: keep only the inputs of layers for the backward pass, which computes their activations again.
        hang_timeout: seconds after which a rank of several that is stopped, or that stays in a part of an update ten times as
            long as the last updates took, is named and the job ended. 0: no watch.
        offload: keep the optimizer's states in the host's memory, with ZeRO stage 3 also the weights; for GPUs.
        lora_rank: train LoRA adapters of this rank, and no weight of the model.
        lora_alpha: scale of the adapters' product times rank; by default twice the rank.
        lora_targets: matrices with an adapter, by their Hugging Face names or ends of them: q_proj,v_proj; all-linear:
            attention and MLP, experts included.
        rslora: rank-stabilised LoRA: the scale is alpha / sqrt(rank) instead of alpha / rank.
        publish: what a training with LoRA publishes: an adapter in PEFT's form (the default), or the source with the adapters
            merged.
    """

    source: ExistingDir
    target: Path
    overwrite: bool = False
    global_batch_size: Positive = 32
    micro_batch_size: Positive = 8
    learning_rate: Rate = 1e-5
    warmup_steps: NonNegative = 0
    max_gradient_norm: Above = 1.0
    precision: TrainingPrecision | None = None
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    processes: Positive | None = None
    seed: Seed = 0
    save_every: Positive = 10
    log_every: Positive = 1
    track: tuple[Track, ...] = DEFAULT
    gradient_checkpointing: bool = False
    hang_timeout: NonNegative = HANG_SECONDS
    offload: bool = False
    lora_rank: Positive | None = None
    lora_alpha: Above | None = None
    lora_targets: tuple[str, ...] | None = None
    rslora: bool = False
    publish: Literal["adapter", "merged"] | None = None

    def __post_init__(self) -> None:
        """Check that the flags of LoRA are given with it, and that there is a sharded state to offload."""
        if self.offload and not self.zero:
            raise UserError("--offload moves the states that ZeRO shards; give --zero 1, 2 or 3, too")
        if self.lora_rank is None:
            refuse_without_rank(
                {
                    "--lora-alpha": self.lora_alpha,
                    "--lora-targets": self.lora_targets,
                    "--lora-dropout": self.adapter_dropout or None,
                    "--rslora": self.rslora or None,
                    "--publish": self.publish,
                }
            )

    @property
    def adapter_dropout(self) -> float:
        """Of the adapters' input."""
        return 0.0

    @property
    def published_kind(self) -> Literal["hf", "adapter"]:
        """The kind of the target."""
        return "hf" if self.lora_rank is None or self.publish == "merged" else "adapter"

    def precision_on(self, device_type: str) -> TrainingPrecision:
        """The precision on a device of this type: `--precision`, by default bf16 on a GPU and fp32 elsewhere."""
        return self.precision or ("bf16" if device_type == "cuda" else "fp32")

    def check_device(self, device_type: str) -> None:
        """UserError for an option without effect on a device of this type."""
        if self.offload and device_type != "cuda":
            raise UserError("--offload moves states from the GPU to the host, and there is no GPU here; leave it out")

    def processes_on(self, gpus: int) -> int:
        """The default of `--processes` on a machine: one per GPU, or the most that `check` accepts."""
        for processes in range(gpus, 1, -1):
            try:
                self.check(processes)
            except UserError:
                continue
            return processes
        return 1

    def check(self, world_size: int) -> None:
        """UserError unless global_batch_size is a multiple of micro_batch_size * world_size."""
        if self.global_batch_size % (self.micro_batch_size * world_size):
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} times {world_size} process(es)"
            )


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(Options):
    """Options of `rlhf reward` and `rlhf dpo`: what is trained on pairs.

    Attributes:
        data: preference pairs, rows of a file or of a folder of files; a prompt may be a text or a list of messages.
        validation_fraction: fraction of the pairs held out of training.
        epochs: passes over the training pairs.
        global_batch_size: pairs per update, over all processes.
        micro_batch_size: pairs per forward pass of a process.
        sequence_length: maximum tokens of prompt and reply; longer pairs are dropped and counted. By default the
            model's context length.
        learning_rate: of AdamW, linear decay to 0 after the warm-up.
        lora_dropout: dropout of the adapters' input.
    """

    data: Existing
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    epochs: Above = 1.0
    sequence_length: Positive | None = None
    save_every: Positive = 100
    log_every: Positive = 10

    @property
    def adapter_dropout(self) -> float:
        """Of the adapters' input."""
        return self.lora_dropout or 0.0

    @property
    def inputs(self) -> dict[str, Path | list[Path]]:
        """Input files and directories."""
        return {"source": self.source, "data": self.data}

    def updates(self, rows: int) -> int:
        """How many are made on so many rows: whole ones in each epoch, the last one of an epoch with what is left."""
        return math.ceil(self.epochs * math.ceil(rows / self.global_batch_size))

    def length_within(self, context_length: int) -> int:
        """The maximum tokens of a sequence; UserError if `--sequence-length` is above the model's context."""
        if (self.sequence_length or 0) > context_length:
            raise UserError(
                f"--sequence-length {self.sequence_length} is above the model's context of {context_length}"
            )
        return self.sequence_length or context_length


@dataclass(frozen=True, kw_only=True)
class RewardOptions(PreferenceOptions):
    """`rlhf reward`.

    Attributes:
        seed: of the held-out pairs, the head's initialisation and the order of pairs.
    """


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """`rlhf score`.

    Attributes:
        source: the directory of a reward model, of `rlhf reward`.
        data: rows with replies: pairs of chosen and rejected, a prompt with completion (as `infer generate` writes), or messages
            that end with the reply; of a file or of a folder of files.
        target: the directory to publish, with scores.jsonl.
        overwrite: replace the target and its unfinished scores.
        micro_batch_size: replies per forward pass.
        precision: of the arithmetic; by default bf16 on a GPU and fp32 elsewhere.
    """

    source: ExistingDir
    data: Existing
    target: Path
    overwrite: bool = False
    micro_batch_size: Positive = 8
    precision: TrainingPrecision | None = None


DPOLoss = Literal["sigmoid", "hinge", "ipo", "robust", "nca_pair", "sppo_hard", "apo_zero", "apo_down"]


@dataclass(frozen=True, kw_only=True)
class DPOOptions(PreferenceOptions):
    """`rlhf dpo`.

    Attributes:
        source: the Hugging Face directory of the initial policy, which is the reference, too.
        seed: of the held-out pairs and the order of pairs.
        learning_rate: of AdamW, linear decay to 0 after the warm-up.
        beta: weight of the divergence from the source; the larger, the closer the policy stays.
        loss: sigmoid is DPO's. README.md names the papers of the others.
        label_smoothing: share of pairs whose sides are taken to be swapped; of the robust loss only, below 0.5.
    """

    learning_rate: Rate = 1e-6
    beta: Above = 0.1
    loss: DPOLoss = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def __post_init__(self) -> None:
        """As in `Options`; also, the flags of one loss are given with it."""
        super().__post_init__()
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise UserError(
                f"--label-smoothing {self.label_smoothing:g} with --loss {self.loss}: it is the share of swapped pairs that "
                "--loss robust assumes; give both, with a share above 0, or neither"
            )


@dataclass(frozen=True, kw_only=True)
class KTOOptions(PreferenceOptions):
    """`rlhf kto`.

    Attributes:
        source: the Hugging Face directory of the initial policy, which is the reference, too.
        data: replies with a label, or preference pairs, whose sides are a desirable and an undesirable reply; rows of a file or
            of a folder of files.
        validation_fraction: fraction of the replies held out of training.
        epochs: passes over the training replies.
        global_batch_size: replies per update, over all processes.
        micro_batch_size: replies per forward pass of a process, at least 2; the KL divergence is estimated over them.
        sequence_length: maximum tokens of prompt and reply; longer ones are dropped and counted. By default the model's
            context length.
        learning_rate: of AdamW, linear decay to 0 after the warm-up.
        seed: of the held-out replies and the order of replies, which is the same in every epoch.
        beta: weight of the divergence from the source; the larger, the closer the policy stays.
        desirable_weight: of the loss of desirable replies.
        undesirable_weight: of the loss of undesirable replies.
    """

    learning_rate: Rate = 1e-6
    beta: Above = 0.1
    desirable_weight: Above = 1.0
    undesirable_weight: Above = 1.0

    def check(self, world_size: int) -> None:
        """As in `Options`; also, micro_batch_size is at least 2."""
        super().check(world_size)
        if self.micro_batch_size < 2:
            raise UserError(
                "--micro-batch-size 1: KTO estimates the KL divergence from replies to other prompts of the micro-batch; "
                "give at least 2"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
    """Options of `rlhf ppo` and `rlhf grpo`.

    Attributes:
        source: the Hugging Face directory of the initial policy.
        prompts: rows of a file or of a folder of files, with prompt or messages; other columns are arguments of reward functions.
        reward: model:DIR (of `rlhf reward`) or py:FILE:FUNCTION; a weighted sum as in 0.5*model:DIR,py:FILE:f.
        reward_timeout: seconds that a Python file may take to load, and a call of a reward function; then the run ends.
        steps: updates of the run.
        max_new_tokens: maximum tokens of a reply.
        temperature: of sampling, and of the trained distribution.
        clip_range: epsilon; the probability ratio is clipped to [1 - epsilon, 1 + epsilon].
        global_batch_size: replies per update, over all processes.
        micro_batch_size: replies per forward pass of a process.
        seed: of sampling and shuffling.
        rollout_micro_batch_size: replies that a process samples at once, by default all of a roll-out; bounds the memory of keys
            and values. What is sampled does not depend on the number, but differs from the default's.
        rollouts: addresses of `infer rollouts`, separated by commas, that sample the replies, such as http://127.0.0.1:8000/v1;
            by default this command samples itself.
        publish_by: how --rollouts get the policy: a directory below --policies; a broadcast over the network to servers
            that were started with --broadcasts; or, of --lora-rank, the adapter alone, below --policies, to servers that were
            started with --lora-rank.
        policies: folder in which the policy is published for --rollouts; the servers' --policies, under the same path.
        rollout_key_file: file with the API key of --rollouts.
        rollout_timeout: seconds that --rollouts may take for the replies of a process, or to take over a policy; then the run
            ends.
        validation_prompts: rows as of --prompts, which are not trained on: the policy answers them before the first update, every
            --evaluate-every steps and after the last, into replies.jsonl and report.html.
        evaluate_every: steps between two answers to --validation-prompts; by default only the first and the last.
        keep_best: publish the policy with the highest mean reward on --validation-prompts, too, as the folder best of the target.
        log_prob_gap_limit: largest mean difference between the sampler's and the trainer's log-probabilities of a roll-out, nats
            a token; above it the run ends. By default 0.001 if both compute in fp32, of fp32 weights, else 0.1.
    """

    prompts: Existing
    reward: str
    reward_timeout: Above = 600.0
    steps: Positive = 100
    max_new_tokens: Positive = 128
    temperature: Temperature = 1.0
    clip_range: Above = 0.2
    rollout_micro_batch_size: Positive | None = None
    rollouts: tuple[str, ...] = ()
    publish_by: Literal["directory", "broadcast", "adapter"] = "directory"
    policies: ExistingDir | None = None
    rollout_key_file: Existing | None = None
    rollout_timeout: Above = 3600.0
    log_prob_gap_limit: Above | None = None
    validation_prompts: Existing | None = None
    evaluate_every: Positive | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        """As in `Options`; also, `reward` and the addresses are read early, and flags are given with what they belong to."""
        super().__post_init__()
        parse(self.reward)
        for flag, asked in (("--evaluate-every", self.evaluate_every), ("--keep-best", self.keep_best)):
            if asked and self.validation_prompts is None:
                raise UserError(
                    f"{flag} is about --validation-prompts, prompts to measure with: give it, too, or leave it out"
                )
        _check_addresses(self.rollouts)
        if self.rollouts and self.rollout_micro_batch_size:
            raise UserError("--rollout-micro-batch-size: servers of --rollouts batch by themselves; leave it out")
        broadcast = self.publish_by == "broadcast"
        if self.rollouts and self.policies is None and not broadcast:
            raise UserError(
                "--rollouts needs --policies, the folder from which the servers take the policy, or --publish-by broadcast"
            )
        for flag, given in (
            ("--policies", self.policies),
            ("--rollout-key-file", self.rollout_key_file),
            ("--publish-by", self.publish_by != "directory" or None),
        ):
            if given is not None and not self.rollouts:
                raise UserError(f"{flag} is for servers that sample the replies: give --rollouts, too, or leave it out")
        if self.publish_by == "adapter" and self.lora_rank is None:
            raise UserError(
                "--publish-by adapter publishes the adapter that is trained: give --lora-rank, or leave --publish-by out"
            )
        if broadcast and self.policies is not None:
            raise UserError("--publish-by broadcast writes no policy: leave --policies out")

    @cached_property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The components of `--reward`."""
        return parse(self.reward)

    @property
    def inputs(self) -> dict[str, Path | list[Path]]:
        """Input files and directories, those in `reward` included, with the modules beside a Python file that it imports."""
        rewards = [path for spec in self.rewards for path in spec.files]
        held_out = {"validation_prompts": self.validation_prompts} if self.validation_prompts else {}
        return {"source": self.source, "prompts": self.prompts, "reward_source": rewards, **held_out}


_OF_ADDRESSES = {chr(code) for code in range(0x21, 0x7F)}  # printable ASCII without the blank


def _check_addresses(addresses: tuple[str, ...]) -> None:
    for address in addresses:
        try:
            parts = urlsplit(address)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            known = known and not (parts.query or parts.fragment or set(address) - _OF_ADDRESSES)
        except ValueError:  # of the port, or of an IPv6 host
            known = False
        if not known:
            raise UserError(f"--rollouts {address} is not an address such as http://127.0.0.1:8000/v1")
        if addresses.count(address) > 1:
            raise UserError(f"--rollouts names {address} twice")


ImportanceCorrection = Literal["none", "token_truncate", "token_mask", "sequence_mask"]
CAP = 2.0


def check_cap(correction: ImportanceCorrection, cap: float) -> None:
    if correction == "none" and cap != CAP:
        raise UserError(f"--importance-cap {cap:g} acts with --importance-correction only; give both, or neither")


@dataclass(frozen=True, kw_only=True)
class GroupOptions(PolicyOptions):
    """Options of `rlhf grpo` and `rlhf rloo`.

    Attributes:
        steps: updates.
        generations: replies per prompt; advantages are relative to their mean.
        global_batch_size: replies per update, over all processes; a multiple of --generations.
        epochs: updates on the same replies.
        kl_coefficient: weight of the KL divergence from the source in the loss; with 0 no reference model is loaded.
    """

    generations: Annotated[int, Field(ge=2, le=2**31 - 1)] = 8
    global_batch_size: Positive = 64
    epochs: Positive = 1
    kl_coefficient: Rate = 0.0

    def check(self, world_size: int) -> None:
        """As in `Options`; also, global_batch_size is a multiple of generations, and save_every of epochs."""
        super().check(world_size)
        if self.global_batch_size % self.generations:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --generations {self.generations}"
            )
        if self.save_every % self.epochs:
            raise UserError(
                f"--save-every {self.save_every} is not a multiple of --epochs {self.epochs}: replies are used in that "
                "many updates and are not part of the state"
            )


GRPOLoss = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(GroupOptions):
    """`rlhf grpo`.

    Attributes:
        loss: what the sum over tokens is divided by; cispo is another sum, too. README.md has the formulas and papers.
        reward_normalisation: of several rewards: their weighted sum is normalised over a prompt's replies, or each of them is,
            and then the sum over the update.
        scale_rewards: whose deviation advantages are divided by: the prompt's replies, the update's, or none.
        importance_correction: weight of a token in the loss, from the ratio of trainer to sampler: capped, or the ratio within
            the bounds and 0 beyond, of a token or of its whole reply. README.md has the formulas and papers.
        importance_cap: the largest ratio; the smallest of the masks is its inverse.
    """

    loss: GRPOLoss = "dapo"
    reward_normalisation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_correction: ImportanceCorrection = "none"
    importance_cap: Annotated[float, Field(gt=1)] = CAP

    def __post_init__(self) -> None:
        """As in `PolicyOptions`; also, a scale and a cap are given where they act."""
        super().__post_init__()
        check_cap(self.importance_correction, self.importance_cap)
        if self.reward_normalisation == "normalize_then_sum" and self.scale_rewards != "group":
            raise UserError(
                f"--scale-rewards {self.scale_rewards} with --reward-normalisation normalize_then_sum, which scales each "
                "reward by its prompt's replies; leave --scale-rewards out"
            )


@dataclass(frozen=True, kw_only=True)
class RLOOOptions(GroupOptions):
    """`rlhf rloo`.

    Attributes:
        generations: replies per prompt; the baseline of each is the mean reward of the others.
        clip_range: epsilon; the probability ratio of a whole reply is clipped to [1 - epsilon, 1 + epsilon].
        kl_coefficient: weight of the KL divergence from the source in the reward; with 0 no reference model is loaded.
    """

    kl_coefficient: Rate = 0.05
