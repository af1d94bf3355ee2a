"""`rlhf kto`: the loss is the paper's, the published policy samples what is desirable, runs resume; bad labels are refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig

from shared.checkpoint.directory.open import open_checkpoint
from tools.rlhf.algorithms import kto
from tools.rlhf.data import LabelledReply, read_labelled_replies
from tools.rlhf.engines.preference_trainers import OwnTokensKTOTrainer
from tools.rlhf.models import keep_in_evaluation_mode, load_policy, open_source
from tools.rlhf.options import KTOOptions

USER, RED = {"role": "user", "content": "pink"}, {"role": "assistant", "content": " red"}


def flags(world, target, **changes):
    usual = {"source": world.policy, "data": world.pairs, "target": world.root / target, "learning_rate": 1e-3}
    return usual | {"save_every": 4} | changes


@pytest.fixture(scope="module")
def trained(world, rlhf):
    assert rlhf("kto", **flags(world, "kto")) == 0
    return world.root / "kto"


def test_the_published_policy_samples_what_is_desirable(world, trained, sampled_red):
    assert sampled_red(trained) > 2 * sampled_red(world.policy)
    facts = open_checkpoint(trained, kinds=("hf",), flag="--source").facts
    assert (facts["replies"], facts["held_out"], facts["updates"]) == (432, 48, 14)


def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, unmoved, trainers):
    target = world.root / "kto-control"
    assert rlhf("kto", **flags(world, target, learning_rate=0.0, epochs=0.2)) == 0
    unmoved(target)
    # 1 - sigmoid(0). Policy and reference differ by the padding of their batches only: float32, sums of nine log-probabilities.
    assert [row["loss"] for row in metrics(target)] == pytest.approx([0.5] * 3, abs=1e-6)
    assert [trainer.ref_model for trainer in trainers] == [None]  # no second model


def test_a_stopped_run_resumes_to_the_same_result(world, rlhf, trained, metrics, signalled):
    target = flags(world, "kto-stopped")
    signalled(5)
    assert rlhf("kto", **target) == 75
    assert rlhf("kto", **target) == 0
    assert metrics(target["target"]) == metrics(trained)
    assert (target["target"] / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_the_loss_is_the_papers(world, tmp_path):
    """Equations 7 and 8 of arXiv:2402.01306, given log-probabilities in float64; sides differ by the order of additions."""
    options = KTOOptions(
        source=world.policy, data=world.pairs, target=tmp_path, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7
    )
    settings = kto._algorithm(options, []).settings
    replies = [
        LabelledReply(prompt=(5, 6), reply=(7, 8, 1), label=True),
        LabelledReply(prompt=(9,), reply=(10, 1), label=False),
        LabelledReply(prompt=(6, 6, 6), reply=(11, 12, 13, 1), label=False),
    ]
    rows = kto.with_others_replies(replies, 3)
    assert [row["KL_completion_ids"] for row in rows] == [[11, 12, 13, 1], [7, 8, 1], [10, 1]]
    source = open_source(world.policy)
    policy = load_policy(source, torch.float32)
    keep_in_evaluation_mode(policy)
    arguments = KTOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", precompute_ref_log_probs=True,
        max_length=None, gradient_checkpointing=False, disable_dropout=False, **settings,
    )  # fmt: skip
    trainer = OwnTokensKTOTrainer(
        model=policy, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=source.tokenizer
    )
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(source.tokenizer), generator=generator, dtype=torch.float64) - 3

    def model(*, input_ids, labels, **unused):
        log_probs = table[input_ids[:, 1:]].masked_fill(labels[:, 1:] == -100, 0.0)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def log_ratio(ids, reference):
        return sum(table[i].item() for i in ids) - reference

    batch = trainer.data_collator(rows)
    references, others = [-9.0, -7.5, -14.0], [-12.5, -11.0, -8.0]
    batch["ref_logps"] = torch.tensor(references, dtype=torch.float64)
    batch["ref_KL_logps"] = torch.tensor(others, dtype=torch.float64)
    z = sum(log_ratio(row["KL_completion_ids"], other) for row, other in zip(rows, others, strict=True)) / 3
    assert z > 0.1
    total = 0.0
    for each, reference in zip(replies, references, strict=True):
        r = log_ratio(each.reply, reference)
        value = 0.3 * (r - z) if each.label else 0.3 * (z - r)
        total += (1.2 if each.label else 0.7) * (1 - 1 / (1 + math.exp(-value)))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / 3, abs=1e-9)


FORMS = {
    "explicit": {"prompt": [USER], "completion": " red", "label": True},
    "one message": {"prompt": [USER], "completion": [RED], "label": 1},
    "implicit": {"completion": [USER, RED], "label": True},
    "messages": {"messages": [USER, RED], "label": True},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "pink"}, {"from": "gpt", "value": " red"}], "kto_tag": True,
    },
}  # fmt: skip


def test_every_form_is_the_same_reply(world, tmp_path):
    tokenizer = open_source(world.policy).tokenizer
    data = tmp_path / "rows.jsonl"
    pair = {"prompt": [USER], "chosen": " red", "rejected": " blue"}
    data.write_text("".join(json.dumps(row) + "\n" for row in [*FORMS.values(), pair]))
    replies, dropped = read_labelled_replies(data, tokenizer, max_length=8, context_length=96)
    assert dropped == {"too long": 0}
    *same, other = replies
    assert len(same) == len(FORMS) + 1
    assert set(same) == {same[0]}
    assert same[0].label
    assert tokenizer.decode([*same[0].prompt, *same[0].reply]) == "colors: pink red<eos>"
    assert (tokenizer.decode(list(other.reply)), other.label) == (" blue<eos>", False)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "a", "completion": "b"}, ["no column 'label', nor 'chosen' and 'rejected'"]),
        ({"prompt": "a", "completion": "b", "label": "good"}, ["'label' is 'good'", "true"]),
        ({"prompt": "a", "completion": "b", "label": None}, ["'label' is None"]),
        ({"prompt": "a", "label": True}, ["no column 'completion'"]),
        ({"prompt": "a", "completion": "", "label": False}, ["the reply of an undesirable row is empty"]),
        ({"completion": "b", "label": True}, ["no column 'prompt'"]),
        ({"completion": [RED], "label": True}, ["a reply alone"]),
        ({"prompt": "a", "completion": [USER, RED], "label": True}, ["a conversation and there is 'prompt'"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": True}, ["one reply or two"]),
        ({"prompt": " red" * 96, "completion": "b", "label": True}, ["96 tokens", "context of 96"]),
    ],
)
def test_bad_rows_are_named(world, rlhf, tmp_path, capsys, row, names):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    assert rlhf("kto", **flags(world, tmp_path / "out", data=data)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(name in message for name in ["rows.jsonl:1", *names]), message
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"beta": 0}, ["--beta"]), ({"micro_batch_size": 1}, ["--micro-batch-size 1", "at least 2"])],
)
def test_mistakes_in_flags_are_named(world, rlhf, tmp_path, capsys, changes, names):
    assert rlhf("kto", **flags(world, tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
