"""The `rlhf` command: reward models, DPO, KTO, GRPO and RLOO on TRL, PPO on DeepSpeed."""

from __future__ import annotations

import os

from shared.cli import Tool
from tools.rlhf.options import DPOOptions, GRPOOptions, KTOOptions, Options, RewardOptions, RLOOOptions, ScoreOptions
from tools.rlhf.ppo_options import PPOOptions

# Read when huggingface_hub is imported. TRL's trainers report their use otherwise, and a missing path would start a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

tool = Tool(
    "rlhf",
    summary="Train a reward model, and a policy on rewards or preferences, from and to Hugging Face directories.",
)

# gradient_checkpointing and offload: where numbers are kept, not what they are.
_NOT_FINGERPRINTED = ("save_every", "log_every", "track", "hang_timeout", "gradient_checkpointing", "offload")
# Where replies are sampled, and when a run is given up: not what is computed.
_ROLLOUTS = (
    *("reward_timeout", "rollouts", "publish_by", "policies", "rollout_key_file", "rollout_timeout"),
    "log_prob_gap_limit",
)
_OF_SAMPLING = (*_NOT_FINGERPRINTED, *_ROLLOUTS)
_ZERO = ("zero",)
_PPO = (
    *("kl_horizon", "update_kl_limit", "critic_warmup_steps", "entropy_coefficient", "normalise_rewards"),
    *("reward_clip", "pretraining_data", "pretraining_coefficient", "pretraining_length"),
    *("shared_critic", "value_coefficient"),
)
_LORA = ("lora_rank", "lora_alpha", "lora_targets", "rslora", "publish")
_LORA_OF_ROWS = (*_LORA, "lora_dropout")
_HELD_OUT = ("validation_prompts", "evaluate_every", "keep_best")
_ROLLOUT = ("rollout_micro_batch_size",)
_IMPORTANCE = ("importance_correction", "importance_cap")


@tool.command(not_fingerprinted=_NOT_FINGERPRINTED, added=(*_ZERO, *_LORA_OF_ROWS))
def reward(options: RewardOptions) -> int | None:
    """Train a reward model on preference pairs, with TRL's RewardTrainer.

    Reads a Hugging Face causal language model and JSON lines of {"prompt", "chosen", "rejected"}; publishes a Hugging
    Face directory of a sequence-classification model with one label, and prints its accuracy on held-out pairs before
    and after training. Killed or stopped, the same command resumes from TARGET.state.
    """
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.reward import run

        run(options)
    return code


@tool.command()
def score(options: ScoreOptions) -> None:
    """Score replies by a reward model.

    Reads a directory of `rlhf reward` and JSON lines of replies; publishes scores.jsonl, the rows with their rewards, and prints
    means, and for pairs accuracy and calibration, as a line of JSON. Killed or stopped, the same command does the rest.
    """
    from tools.rlhf.score import run

    run(options)


@tool.command(not_fingerprinted=_NOT_FINGERPRINTED, added=(*_ZERO, *_LORA_OF_ROWS))
def dpo(options: DPOOptions) -> int | None:
    """Train a policy on preference pairs by DPO, with TRL's DPOTrainer: no reward model, no roll-outs.

    Reads a Hugging Face causal language model and the pairs that `rlhf reward` reads; publishes a Hugging Face directory of
    the trained policy, and prints its loss and accuracy on held-out pairs. Killed or stopped, the same command resumes from
    TARGET.state.
    """
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.dpo import run

        run(options)
    return code


@tool.command(not_fingerprinted=_NOT_FINGERPRINTED, added=(*_ZERO, *_LORA_OF_ROWS))
def kto(options: KTOOptions) -> int | None:
    """Train a policy on replies labelled desirable or not by KTO, with TRL's KTOTrainer.

    Reads a Hugging Face causal language model and rows of {"prompt", "completion", "label"}, or preference pairs; publishes a
    Hugging Face directory of the trained policy. Killed or stopped, the same command resumes from TARGET.state.
    """
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.kto import run

        run(options)
    return code


@tool.command(not_fingerprinted=_OF_SAMPLING, added=("backend", *_ROLLOUT, *_IMPORTANCE, *_HELD_OUT, *_LORA, *_PPO))
def ppo(options: PPOOptions) -> int | None:
    """Train a policy on rewards by PPO, on DeepSpeed engines or by trlx.

    Reads a Hugging Face causal language model and JSON lines of {"prompt"} or {"messages"}; publishes a Hugging Face
    directory of the trained policy. Killed or stopped, the same command resumes from TARGET.state.
    """
    if options.backend == "trlx":
        from tools.rlhf.engines import trlx_package, trlx_settings

        trlx_settings.check(options)
        trlx_package.locate()
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.ppo import run

        run(options)
    return code


@tool.command(
    not_fingerprinted=_OF_SAMPLING,
    added=("loss", "reward_normalisation", "scale_rewards", *_ROLLOUT, *_IMPORTANCE, *_HELD_OUT, *_ZERO, *_LORA),
)
def grpo(options: GRPOOptions) -> int | None:
    """Train a policy on rewards by GRPO, with TRL's GRPOTrainer: no critic, advantages are relative to a prompt's replies.

    Inputs and output are those of `rlhf ppo`. Killed or stopped, the same command resumes from TARGET.state.
    """
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.grpo import run

        run(options)
    return code


@tool.command(not_fingerprinted=_OF_SAMPLING, added=(*_ROLLOUT, *_HELD_OUT, *_ZERO, *_LORA))
def rloo(options: RLOOOptions) -> int | None:
    """Train a policy on rewards by RLOO, with TRL's RLOOTrainer: a reply's baseline is the mean of the prompt's other replies.

    Inputs and output are those of `rlhf ppo`. Killed or stopped, the same command resumes from TARGET.state.
    """
    code = _launch(options)
    if code is None:
        from tools.rlhf.algorithms.rloo import run

        run(options)
    return code


def _launch(options: Options) -> int | None:
    """Start the ranks, after the checks that need no imports; None: this process is one."""
    import os

    from shared.report.track import check_installed
    from shared.runtime.launch import launch, visible_gpus

    check_installed(options.track)
    if options.processes is None and "RANK" not in os.environ:
        return launch(options.processes_on(visible_gpus()))
    return launch(options.processes)


def main() -> None:
    """The console script."""
    tool.run()
