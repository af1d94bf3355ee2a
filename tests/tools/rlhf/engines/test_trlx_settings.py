"""Flags of `rlhf ppo` as trlx's and accelerate's settings, and what is refused: no trlx is needed."""

from dataclasses import dataclass, fields

import pytest

from shared.errors import UserError
from tools.rlhf.engines.trlx_settings import TrlxSettings, check
from tools.rlhf.ppo_options import PPOOptions


def options(world, **changes):
    usual = {
        "source": world.policy,
        "prompts": world.prompts,
        "reward": world.reward("red"),
        "target": world.root / "t",
    }
    return PPOOptions(**usual | {"backend": "trlx"} | changes)


def settings(world, *, world_size=1, precision="fp32", **changes):
    return TrlxSettings.of(options(world, **changes), precision=precision, world_size=world_size)


def test_flags_reach_the_fields_that_trlx_reads(world):
    given = {
        "epochs": 3, "global_batch_size": 16, "micro_batch_size": 2, "clip_range": 0.1, "value_clip_range": 0.4,
        "discount": 0.9, "gae_lambda": 0.8, "seed": 7,
    }  # fmt: skip
    sections = settings(world, world_size=2, **given).sections()
    train, method = sections["train"], sections["method"]
    assert (train["batch_size"], train["minibatch_size"], train["seed"]) == (8, 2, 7)  # of one process
    assert (method["ppo_epochs"], method["cliprange"], method["cliprange_value"]) == (3, 0.1, 0.4)
    assert (method["gamma"], method["lam"]) == (0.9, 0.8)
    assert (train["epochs"], train["tracker"], train["save_best"], method["target"]) == (1, None, False, None)
    assert sections["optimizer"]["kwargs"]["betas"] == (0.9, 0.95)  # those of the DeepSpeed backend


def test_each_flag_has_an_effect(world):
    """Every setting is taken from its flag: two values, two settings."""
    other = {
        "epochs": 5, "global_batch_size": 64, "micro_batch_size": 4, "temperature": 0.7, "clip_range": 0.3,
        "value_clip_range": 0.3, "discount": 0.9, "gae_lambda": 0.9, "whiten_advantages": False, "max_gradient_norm": 2.0,
        "zero": 1, "seed": 3,
    }  # fmt: skip
    before = settings(world)
    for name, value in other.items():
        changed = settings(world, **{name: value})
        differing = [
            field.name for field in fields(before) if getattr(before, field.name) != getattr(changed, field.name)
        ]
        assert differing == ["batch_size" if name == "global_batch_size" else name]


def test_accelerate_is_told_of_zero_precision_and_micro_batches(world):
    plain = settings(world, global_batch_size=32, micro_batch_size=8)
    assert plain.environment(cpu=True) == {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "true",
    }
    assert "ACCELERATE_USE_CPU" not in plain.environment(cpu=False)
    sharded = settings(world, zero=3, precision="bf16", max_gradient_norm=0.5).environment(cpu=True)
    assert sharded["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert sharded["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert sharded["ACCELERATE_GRADIENT_CLIPPING"] == "0.5"
    assert sharded["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert "ACCELERATE_USE_CPU" not in sharded  # with it, accelerate takes no DeepSpeed


REFUSED = {
    "--critic": lambda world: {"critic": world.policy},
    "--critic-learning-rate": lambda world: {"critic_learning_rate": 1e-4},
    "--importance-correction": lambda world: {"importance_correction": "token_mask"},
    "--offload": lambda world: {"offload": True, "zero": 1},
    "--update-kl-limit": lambda world: {"update_kl_limit": 0.1},
    "--critic-warmup-steps": lambda world: {"critic_warmup_steps": 1},
    "--entropy-coefficient": lambda world: {"entropy_coefficient": 0.01},
    "--pretraining-data": lambda world: {"pretraining_data": world.prompts},
    "--shared-critic": lambda world: {"shared_critic": True},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_trlx_cannot_honour_is_refused_by_name(world, flag):
    with pytest.raises(UserError, match=f"{flag} does not go with --backend trlx"):
        check(options(world, **REFUSED[flag](world)))
    check(options(world))


def test_what_our_loop_does_is_honoured(world):
    """Rewards and KL coefficient of an iteration are made before trlx sees it."""
    check(options(world, kl_target=6.0, kl_horizon=5.0, normalise_rewards="standardise", reward_clip=2.0))
    check(options(world, gradient_checkpointing=True))
    lora = {"lora_rank": 4, "lora_alpha": 16.0, "lora_targets": ("q_proj",), "rslora": True, "publish": "merged"}
    check(options(world, **lora))


def test_a_flag_that_is_not_known_here_is_refused(world):
    """A later option of `rlhf ppo` is not ignored."""

    @dataclass(frozen=True, kw_only=True)
    class Later(PPOOptions):
        entropy_of_tomorrow: float = 0.0

    usual = vars(options(world)).copy()
    usual.pop("rewards", None)
    check(Later(**usual))
    with pytest.raises(
        UserError, match="--entropy-of-tomorrow does not go with --backend trlx: its trainer has nothing"
    ):
        check(Later(**usual, entropy_of_tomorrow=0.1))


def test_the_command_refuses_before_it_starts(world, rlhf, capsys, monkeypatch):
    monkeypatch.delenv("BATON_TRLX", raising=False)
    usual = {"source": world.policy, "prompts": world.prompts, "reward": world.reward("red"), "backend": "trlx"}
    target = world.root / "trlx-refused"
    assert rlhf("ppo", **usual, target=target) == 2
    assert "BATON_TRLX" in capsys.readouterr().err
    assert rlhf("ppo", **usual, target=target, critic=world.policy) == 2
    assert "--critic does not go with --backend trlx" in capsys.readouterr().err
    assert not target.exists()
    assert not target.with_name("trlx-refused.state").exists()
