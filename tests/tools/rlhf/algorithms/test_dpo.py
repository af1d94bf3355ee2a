"""`rlhf dpo`: losses are the papers', the published policy samples what was preferred, a control does not move, runs resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from shared.checkpoint.directory.open import open_checkpoint
from tools.rlhf.algorithms import dpo
from tools.rlhf.algorithms.losses import token_log_probs
from tools.rlhf.data import read_ranked_replies
from tools.rlhf.engines.preference_trainers import OwnTokensDPOTrainer
from tools.rlhf.models import keep_in_evaluation_mode, load_policy, open_source
from tools.rlhf.options import DPOOptions

LOSSES = ("sigmoid", "hinge", "ipo", "robust", "nca_pair", "sppo_hard", "apo_zero", "apo_down")


def flags(world, target, **changes):
    usual = {"source": world.policy, "data": world.pairs, "target": world.root / target, "learning_rate": 1e-3}
    return usual | {"epochs": 2, "save_every": 4} | changes


@pytest.fixture(scope="module")
def trained(world, rlhf):
    assert rlhf("dpo", **flags(world, "dpo")) == 0
    return world.root / "dpo"


def test_the_published_policy_samples_what_was_preferred(world, trained, sampled_red, load_exactly):
    """Accuracy and margin do not show it: both are of given replies."""
    load_exactly(AutoModelForCausalLM, trained)
    assert sampled_red(trained) > 2.5 * sampled_red(world.policy)
    facts = open_checkpoint(trained, kinds=("hf",), flag="--source").facts
    assert facts["updates"] == 14
    assert facts["held_out_accuracy"] >= 0.9
    assert facts["held_out_margin"] > 0.2
    assert {"report.html", "metrics.jsonl", "manifest.json", "tensorboard"} <= {path.name for path in trained.iterdir()}


def test_at_learning_rate_zero_nothing_moves(world, rlhf, metrics, unmoved, trainers, capsys):
    target = world.root / "dpo-control"
    assert rlhf("dpo", **flags(world, target, learning_rate=0.0, validation_fraction=0, epochs=0.4)) == 0
    assert "training  4 updates of 32 pairs, 0.4 epoch(s)" in capsys.readouterr().err  # 240 pairs make 8, 0.4 of them
    assert len(metrics(target)) == 4
    unmoved(target)
    # Policy and reference differ by the padding of their batches only: float32, sums of nine log-probabilities.
    assert all(row["loss"] == pytest.approx(math.log(2), abs=1e-6) for row in metrics(target))
    assert [trainer.ref_model for trainer in trainers] == [None]  # no second model


def test_a_stopped_run_resumes_to_the_same_result(world, rlhf, trained, metrics, signalled, monkeypatch, recomputed):
    """The resumed run takes the reference's log-probabilities from the state, and computes activations again."""
    target = flags(world, "dpo-stopped")
    signalled(5)
    assert rlhf("dpo", **target) == 75
    assert not target["target"].exists()
    monkeypatch.setattr(OwnTokensDPOTrainer, "compute_ref_log_probs", None)
    assert rlhf("dpo", **target, gradient_checkpointing=True) == 0
    assert recomputed == [2]
    assert metrics(target["target"]) == metrics(trained)
    assert (target["target"] / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_the_curve_is_that_of_trls_own_reading_and_of_a_second_model(world, rlhf, metrics, tmp_path):
    """TRL tokenises the texts and holds a reference model. The texts end with the prompt's space: no token is merged."""
    target = tmp_path / "ours"
    assert rlhf("dpo", **flags(world, target, validation_fraction=0, epochs=0.5, seed=3)) == 0
    source = open_source(world.policy)
    policy = load_policy(source, torch.float32)
    keep_in_evaluation_mode(policy)
    rows = [json.loads(line) for line in world.pairs.read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    arguments = DPOConfig(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=8, gradient_accumulation_steps=4,
        learning_rate=1e-3, adam_beta2=0.95, num_train_epochs=0.5, seed=3, logging_steps=1, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", max_length=None, disable_dropout=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=policy, args=arguments, train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=AutoTokenizer.from_pretrained(world.policy),
    )  # fmt: skip
    assert trainer.ref_model is not None
    trainer.train()
    losses = [(row["loss"], row["rewards/margins"]) for row in trainer.state.log_history if "loss" in row]
    ours = [(row["loss"], row["rewards/margins"]) for row in metrics(target)]
    assert len(ours) == 4
    # float32; the reference is computed in batches of other lengths.
    assert ours == [pytest.approx(row, abs=2e-5) for row in losses]


@pytest.fixture(scope="module")
def in_float64(world, tmp_path_factory):
    """A trainer with a model in float64, a batch with reference log-probabilities of another model, and the numbers of a pair."""
    work = tmp_path_factory.mktemp("float64")
    source = open_source(world.policy)
    pairs, _ = read_ranked_replies(world.pairs, source.tokenizer, max_length=96, context_length=96)
    pairs = [pairs[0], pairs[1]]
    pairs[1] = type(pairs[1])(prompt=pairs[1].prompt, chosen=pairs[1].chosen[3:], rejected=pairs[1].rejected)
    rows = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs
    ]
    policy = load_policy(source, torch.float64)
    keep_in_evaluation_mode(policy)
    arguments = DPOConfig(
        output_dir=str(work), use_cpu=True, bf16=False, precompute_ref_log_probs=True, report_to="none",
        max_length=None, gradient_checkpointing=False, disable_dropout=False,
    )  # fmt: skip
    trainer = OwnTokensDPOTrainer(
        model=policy, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=source.tokenizer
    )
    batch = trainer.data_collator(rows)
    numbers = []
    for place, pair in enumerate(pairs):
        sides = {}
        for side, reply, shift in (("chosen", pair.chosen, 1.5 - place), ("rejected", pair.rejected, -0.7)):
            ids = torch.tensor([[*pair.prompt, *reply]])
            with torch.no_grad():
                table = torch.log_softmax(policy(ids).logits[0], dim=-1)
            start = len(pair.prompt)
            total = sum(table[start + i - 1, token].item() for i, token in enumerate(reply))
            sides[side] = (total, total - shift, len(reply))
        numbers.append(sides)
    for side in ("chosen", "rejected"):
        batch[f"ref_{side}_logps"] = torch.tensor([each[side][1] for each in numbers], dtype=torch.float64)
    return trainer, batch, numbers


def exactly(model):
    """The model with log-probabilities computed from its logits in float64, where TRL's fused output layer takes float32."""

    def forward(*, labels, fused_lm_head, **inputs):
        log_probs = token_log_probs(model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:])
        log_probs = log_probs.masked_fill(labels[:, 1:] == -100, 0.0)
        unused = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=unused, mean_logits=unused, is_top1=unused.bool())

    return forward


def sigma(x):
    return 1 / (1 + math.exp(-x))


def formula(loss, sides, beta, e):
    """The loss of a pair, as its paper writes it: r is log(policy / reference) of a whole reply, n its tokens."""
    (p_w, q_w, n_w), (p_l, q_l, n_l) = sides["chosen"], sides["rejected"]
    r_w, r_l = p_w - q_w, p_l - q_l
    d = r_w - r_l
    return {
        "sigmoid": -math.log(sigma(beta * d)),
        "hinge": max(0.0, 1 - beta * d),
        "ipo": (r_w / n_w - r_l / n_l - 1 / (2 * beta)) ** 2,
        "robust": (-(1 - e) * math.log(sigma(beta * d)) + e * math.log(sigma(-beta * d))) / (1 - 2 * e),
        "nca_pair": -math.log(sigma(beta * r_w)) - 0.5 * sum(math.log(sigma(-beta * r)) for r in (r_w, r_l)),
        "sppo_hard": (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2,
        "apo_zero": (1 - sigma(beta * r_w)) + sigma(beta * r_l),
        "apo_down": sigma(beta * r_w) + (1 - sigma(beta * d)),
    }[loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_every_loss_is_its_papers(world, in_float64, loss, beta):
    """Given token log-probabilities in float64, both sides differ by the order of additions. TRL's own are float32."""
    trainer, batch, numbers = in_float64
    smoothing = 0.2 if loss == "robust" else 0.0
    options = DPOOptions(
        source=world.policy,
        data=world.pairs,
        target=world.root / "none",
        loss=loss,
        beta=beta,
        label_smoothing=smoothing,
    )
    settings = dpo._algorithm(options).settings
    trainer.beta, trainer.loss_types = settings["beta"], settings["loss_type"]
    trainer.label_smoothing = settings["label_smoothing"]
    expected = sum(formula(loss, sides, beta, smoothing) for sides in numbers) / len(numbers)
    found = trainer.compute_loss(exactly(trainer.model), dict(batch))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, abs=1e-9)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "a", "chosen": "b"}, ["pairs.jsonl:3", "no column 'rejected'"]),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["pairs.jsonl:3", "the same"]),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, ["pairs.jsonl:3", "the reply of 'rejected' is empty"]),
        ({"prompt": " red" * 96, "chosen": "b", "rejected": "c"}, ["pairs.jsonl:3", "96 tokens", "context of 96"]),
    ],
)
def test_bad_rows_are_named(world, rlhf, tmp_path, capsys, row, names):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(world.pairs.read_text().splitlines(keepends=True)[:2]) + json.dumps(row) + "\n")
    assert rlhf("dpo", **flags(world, tmp_path / "out", data=data)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(name in message for name in names), message
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"beta": 0}, ["--beta", "0"]),
        ({"beta": -0.1}, ["--beta", "-0.1"]),
        ({"loss": "sigmoids"}, ["--loss", "sigmoid"]),
        ({"loss": "robust"}, ["--label-smoothing 0", "--loss robust"]),
        ({"label_smoothing": 0.1}, ["--label-smoothing 0.1", "--loss sigmoid"]),
        ({"sequence_length": 97}, ["--sequence-length 97", "context of 96"]),
        ({"global_batch_size": 256}, ["leaves 216 pairs", "24 held out", "--global-batch-size 256"]),
    ],
)
def test_mistakes_in_flags_are_named(world, rlhf, tmp_path, capsys, changes, names):
    assert rlhf("dpo", **flags(world, tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message
    assert not list(tmp_path.iterdir())
