"""Roll-outs: columns, masks and log-probabilities against a computation per reply."""

import pytest
import torch

from tools.rlhf.algorithms.experience import policy_log_probs
from tools.rlhf.data import Prompt
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.rollout.in_process import InProcessSampler


@pytest.fixture(scope="module")
def source(world):
    return open_source(world.policy)


def roll_out(source, model, temperature=1.3, seed=5):
    texts = ("colors:", "colors: red blue green", "colors: pink")
    prompts = [Prompt(text=text, ids=tuple(source.tokenizer(text)["input_ids"])) for text in texts] * 8
    sampler = InProcessSampler(
        model=model, tokenizer=source.tokenizer, max_new_tokens=11, temperature=temperature, eos_ids=source.eos_ids,
        pad_id=source.pad_id, synced_gpus=False,
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
