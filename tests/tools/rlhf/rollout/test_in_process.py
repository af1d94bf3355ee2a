"""Roll-outs: columns, masks and log-probabilities against a computation per reply."""

import pytest
import torch

from tools.rlhf.algorithms.experience import policy_log_probs
from tools.rlhf.data import Prompt
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.rollout.in_process import InProcessSampler, RowNoise


@pytest.fixture(scope="module")
def source(world):
    return open_source(world.policy)


def roll_out(source, model, temperature=1.3, seed=5, size=None, repeats=8):
    texts = ("colors:", "colors: red blue green", "colors: pink")
    prompts = [Prompt(text=text, ids=tuple(source.tokenizer(text)["input_ids"])) for text in texts] * repeats
    sampler = InProcessSampler(
        model=model, tokenizer=source.tokenizer, max_new_tokens=11, temperature=temperature, eos_ids=source.eos_ids,
        pad_id=source.pad_id, synced_gpus=False, micro_batch_size=size,
    )  # fmt: skip
    return sampler.sample(prompts, seed=seed)


def test_the_seed_determines_the_replies(source):
    model = load_policy(source, torch.float32)
    first, second, third = (roll_out(source, model, seed=seed) for seed in (5, 5, 6))
    assert first.replies == second.replies != third.replies
    assert torch.equal(first.sampler_log_probs, second.sampler_log_probs)
    assert len({reply.ids for reply in first.replies}) > 20  # equal prompts get replies of their own


def test_log_probabilities_are_those_of_each_reply_alone(source):
    """Unpadded, one by one, position by position, in transformers' plain forward: sampler and trainer both agree."""
    model = load_policy(source, torch.float32)
    rollout = roll_out(source, model)
    trainer = policy_log_probs(model, rollout.sequences, 1.3).detach()
    for row, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.replies, strict=True)):
        ids = torch.tensor([[*prompt.ids, *reply.ids]])
        with torch.no_grad():
            table = (model(ids).logits[0].double() / 1.3).log_softmax(-1)
        for t, token in enumerate(reply.ids):
            expected = table[len(prompt.ids) + t - 1, token].item()
            # float32 through two layers: the padded batch adds in another order
            assert rollout.sampler_log_probs[row, t].item() == pytest.approx(expected, abs=1e-4)
            assert trainer[row, t].item() == pytest.approx(expected, abs=1e-4)


def test_replies_end_with_the_first_eos(source):
    rollout = roll_out(source, load_policy(source, torch.float32))
    ended = [reply.ended for reply in rollout.replies]
    assert True in ended
    assert False in ended
    for reply, mask, scores in zip(
        rollout.replies, rollout.sequences.reply_mask, rollout.sampler_log_probs, strict=True
    ):
        assert mask.tolist() == [1.0] * len(reply.ids) + [0.0] * (len(mask) - len(reply.ids))
        assert 1 not in reply.ids[:-1]
        assert reply.ended == (reply.ids[-1] == 1)
        assert "<eos>" not in reply.text
        assert not scores[len(reply.ids) :].any()


def test_rows_drop_padding_columns_only(source):
    rollout = roll_out(source, load_policy(source, torch.float32))
    part = rollout.sequences.rows(torch.tensor([0]))  # the shortest prompt: columns of padding go
    reply = rollout.replies[0]
    assert part.ids[0].tolist() == [*rollout.prompts[0].ids, *reply.ids]
    assert part.position_ids[0].tolist() == list(range(part.ids.shape[1]))
    assert part.reply_mask.shape[1] == len(reply.ids)
    assert part.reply_ids[0].tolist() == list(reply.ids)


def test_parts_of_any_size_sample_the_same_replies(source):
    model = load_policy(source, torch.float32)
    calls = []
    generate = model.generate
    model.generate = lambda **rest: (calls.append(len(rest["input_ids"])), generate(**rest))[1]
    rollouts = [roll_out(source, model, size=size) for size in (24, 7, 1)]
    assert calls == [24, 7, 7, 7, 3, *[1] * 24]  # bounded memory
    for other in rollouts[1:]:
        assert other.replies == rollouts[0].replies
        assert torch.equal(other.sequences.reply_mask, rollouts[0].sequences.reply_mask)
        # float32: padding changes the order of additions
        torch.testing.assert_close(other.sampler_log_probs, rollouts[0].sampler_log_probs, atol=1e-5, rtol=0)
    assert len({reply.ids for reply in rollouts[0].replies}) > 20
    assert roll_out(source, model, size=7, seed=6).replies != rollouts[0].replies


def test_parts_sample_the_distribution(source):
    """The first token of 6000 replies to equal prompts, against the softmax, by chi-squared."""
    model = load_policy(source, torch.float32)
    ids = torch.tensor([source.tokenizer("colors: red")["input_ids"]])
    with torch.no_grad():
        wanted = (model(ids).logits[0, -1] / 1.3).softmax(-1)
    noise = RowNoise(3, range(6000), 1.3, torch.device("cpu"))
    with torch.no_grad():
        scores = noise(ids, model(ids).logits[0, -1].expand(6000, -1))
    found = torch.bincount(scores.argmax(-1), minlength=len(wanted)).double()
    often = wanted * 6000 >= 5
    expected = torch.cat([wanted[often], wanted[~often].sum()[None]]).double() * 6000
    counted = torch.cat([found[often], found[~often].sum()[None]])
    statistic = ((counted - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    bound = (
        freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    )  # 1 in 10,000, by Wilson and Hilferty
    assert statistic < bound, (counted, expected)
