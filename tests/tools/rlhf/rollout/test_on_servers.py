"""Roll-outs from servers: those of `generate` in form, of the whole distribution, of one version."""

import re
from dataclasses import replace

import pytest
import torch

from shared.errors import StageError, UserError
from tests.tools.rlhf.rollout.rollout_server import serving
from tools.rlhf.algorithms.experience import policy_log_probs
from tools.rlhf.data import read_prompts
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rollout.in_process import InProcessSampler
from tools.rlhf.rollout.log_prob_gap import log_prob_gap_limit
from tools.rlhf.rollout.on_servers import server_sampler

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def source(world):
    return open_source(world.policy)


@pytest.fixture(scope="module")
def prompts(world, source):
    return read_prompts(world.prompts, source.tokenizer, context_length=96, max_new_tokens=16)[::8]


@pytest.fixture
def options(world, server, tmp_path):
    (tmp_path / "policies").mkdir()
    return PPOOptions(
        source=world.policy, prompts=world.prompts, reward=world.reward("red"), target=tmp_path / "out", max_new_tokens=16,
        temperature=TEMPERATURE, rollouts=(server.url,), policies=tmp_path / "policies", rollout_timeout=20.0,
    )  # fmt: skip


class Policy:
    def __init__(self, source):
        self.module = load_policy(source, torch.float32)

    def full_weights(self):
        return self.module.state_dict()

    def move(self):
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(1.1)


@pytest.fixture
def sampler(options, source, prompts):
    with server_sampler(options, source, prompts, initialize_distributed()) as made:
        yield made


def test_a_roll_out_has_the_form_of_generates(sampler, source, prompts):
    policy = Policy(source)
    sampler.publisher.publish(policy, 0)
    rollout = sampler.sample(prompts, seed=1)
    again, other = sampler.sample(prompts, seed=1), sampler.sample(prompts, seed=2)
    assert rollout.replies == again.replies != other.replies
    assert any(reply.ended for reply in rollout.replies)
    with torch.no_grad():
        known = policy_log_probs(policy.module, rollout.sequences, TEMPERATURE) * rollout.sequences.reply_mask
    torch.testing.assert_close(rollout.sampler_log_probs, known, atol=1e-5, rtol=0)  # float32, with and without a cache
    ours = InProcessSampler(
        model=policy.module, tokenizer=source.tokenizer, max_new_tokens=16, temperature=TEMPERATURE,
        eos_ids=source.eos_ids, pad_id=source.pad_id, synced_gpus=False,
    ).sample(prompts, seed=1)  # fmt: skip
    width = ours.sequences.ids.shape[1] - ours.sequences.reply_mask.shape[1]
    assert torch.equal(rollout.sequences.ids[:, :width], ours.sequences.ids[:, :width])
    for row, reply in enumerate(rollout.replies):
        assert tuple(rollout.sequences.reply_ids[row, : len(reply.ids)].tolist()) == reply.ids
        assert rollout.sequences.reply_mask[row].sum() == len(reply.ids)
        assert rollout.sequences.attention_mask[row].sum() == len(prompts[row].ids) + len(reply.ids)
        assert reply.text == source.tokenizer.decode(reply.ids, skip_special_tokens=True)
    for name in ("ids", "attention_mask", "reply_mask"):
        assert getattr(rollout.sequences, name).dtype == getattr(ours.sequences, name).dtype


def test_equal_prompts_get_replies_of_their_own(sampler, server, source, prompts):
    sampler.publisher.publish(Policy(source), 0)
    rollout = sampler.sample([prompts[0]] * 8, seed=5)
    assert len({reply.ids for reply in rollout.replies}) > 4
    assert len({request["seed"] for request in server.requests}) == 8


def test_a_restarted_server_gets_the_policy_again(sampler, server, source, prompts):
    """It comes back with the first weights in the midst of a roll-out: no reply of those is kept."""
    policy = Policy(source)
    policy.move()
    sampler.publisher.publish(policy, 3)
    expected = sampler.sample(prompts, seed=4)
    assert len(server.published) == 1
    count = len(server.requests)

    def restart(body):
        if len(server.requests) == count + 3:
            server.restart()

    server.before = restart
    found = sampler.sample(prompts, seed=4)
    assert found.replies == expected.replies
    assert [version for _, version in server.published] == [server.version] * 2
    assert len(server.requests) == count + 2 * len(prompts)


def test_a_server_restarted_between_roll_outs_gets_the_policy_first(sampler, server, source, prompts):
    sampler.publisher.publish(Policy(source), 0)
    server.restart()
    sampler.sample(prompts, seed=4)
    assert len(server.published) == 2
    assert len(server.requests) == len(prompts)


def test_another_trainer_on_the_server_is_named(sampler, server, source, prompts):
    sampler.publisher.publish(Policy(source), 0)

    def change(body):
        server.version = "another run's"

    server.before = change
    with pytest.raises(StageError, match='answers with policy "another run\'s".*another trainer'):
        sampler.sample(prompts, seed=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: choice["token_ids"].pop(), "a reply of 15 tokens with 16"),
        (lambda choice: choice.pop("token_ids"), "no token ids"),
        (lambda choice: choice["token_ids"].__setitem__(0, 1), "ends neither"),
        (lambda choice: choice["token_ids"].__setitem__(0, 10**6), "tokens beyond either"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None), "not finite"),
    ],
)
def test_an_answer_of_another_form_is_refused(sampler, server, source, prompts, change, message):
    sampler = replace(sampler, eos_ids=(1,))
    sampler.publisher.publish(Policy(source), 0)

    def wrong(choice):
        choice["token_ids"], choice["logprobs"]["token_logprobs"] = [5] * 16, [-1.0] * 16
        change(choice)

    server.answer = wrong
    with pytest.raises(StageError, match=message):
        sampler.sample(prompts[:1], seed=4)


def test_servers_that_do_not_fit_are_refused(options, server, source, prompts, world):
    def opened(given):
        with server_sampler(given, source, prompts, initialize_distributed()):
            raise AssertionError("not refused")

    server.max_model_len = 19
    with pytest.raises(UserError, match=re.escape(f"{server.url} has a context of 19 tokens")):
        opened(options)
    server.max_model_len = 96
    with serving(world.policy) as other:
        other.precision = "bf16"
        with pytest.raises(UserError, match="start both alike"):
            opened(replace(options, rollouts=(server.url, other.url)))


def test_a_policy_that_is_published_in_bf16_is_one_of_bf16(options, source, prompts):
    """The server computes in fp32, of weights that were rounded: its gap is that of bf16."""
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bfloat16")):
        with server_sampler(options, replace(source, dtype=dtype), prompts, initialize_distributed()) as made:
            assert made.precision == precision
    assert log_prob_gap_limit("fp32", precision) > 10 * log_prob_gap_limit("fp32", "fp32")


def test_without_addresses_there_is_no_sampler(options, source, prompts):
    with server_sampler(
        replace(options, rollouts=(), policies=None), source, prompts, initialize_distributed()
    ) as none:
        assert none is None
