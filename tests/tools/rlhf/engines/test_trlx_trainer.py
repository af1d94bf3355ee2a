"""trlx's trainer on our experience: needs trlx at BATON_TRLX (`make test-trlx`)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.trlx_checkout import needs_trlx
from tools.rlhf.algorithms import ppo_trlx
from tools.rlhf.algorithms.experience import Experience, policy_log_probs
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.engines.trlx_settings import TrlxSettings
from tools.rlhf.lora import Adapters
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rollout.rollout import Sequences

SETTINGS = {
    "epochs": 1, "batch_size": 4, "micro_batch_size": 4, "temperature": 1.0, "clip_range": 0.2, "value_clip_range": 0.2,
    "discount": 0.9, "gae_lambda": 0.8, "whiten_advantages": False, "max_gradient_norm": 1e9, "zero": 0,
    "precision": "fp32", "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trlx_trainer():
    from tools.rlhf.engines import trlx_package

    trlx_package.import_trlx(trlx_package.locate())
    from tools.rlhf.engines import trlx_trainer

    return trlx_trainer


@pytest.fixture
def options_of(world):
    """The command's options, with some flags."""
    files = {"source": world.policy, "prompts": world.prompts, "target": world.root / "t"}
    return lambda **flags: PPOOptions(**files, reward=world.reward("red"), backend="trlx", **flags)


@pytest.fixture
def open_trainer(world, trlx_trainer, options_of):
    """A trainer of the tiny policy, and its settings changed."""
    source, distributed = open_source(world.policy), initialize_distributed()

    def make(*, recomputed=False, dropout=0.0, **changes):
        settings = TrlxSettings(**SETTINGS | changes, source=str(world.policy))
        options = options_of(gradient_checkpointing=recomputed)
        policy = ppo_trlx.trained_policy(options, source, None, "fp32")
        for layer in policy.modules():
            if hasattr(layer, "attention_dropout"):
                layer.attention_dropout = dropout
        trainer = trlx_trainer.open_trainer(policy, settings, distributed)
        torch.manual_seed(1)
        nudged = trainer.accelerator.unwrap_model(trainer.model).v_head[-1].bias
        torch.nn.init.constant_(nudged, 0.3)
        return trainer

    return make


def experience(lengths=(5, 5, 5, 5)):
    """Random prompts and replies; token 0, the tokenizer's padding, is among the sampled."""
    generator = torch.Generator().manual_seed(0)
    rows, width, columns = len(lengths), 3, max(lengths)
    ids = torch.randint(2, 40, (rows, width + columns), generator=generator)
    mask = torch.tensor([[1.0] * n + [0.0] * (columns - n) for n in lengths])
    attention = torch.cat([torch.ones(rows, width), mask], dim=1).long()
    attention[0, 0] = 0
    ids[1, width + 1] = 0
    draw = lambda low: (low + torch.rand(rows, columns, generator=generator)) * mask  # noqa: E731
    return Experience(
        sequences=Sequences(ids=ids, attention_mask=attention, reply_mask=mask),
        log_probs=draw(-4.0), values=draw(0.0), rewards=draw(-0.5), advantages=mask, returns=mask, weights=mask,
    )  # fmt: skip


@needs_trlx
def test_elements_are_the_sampled_ids(trlx_trainer):
    made = experience((5, 2, 4, 1))
    for row, element in enumerate(trlx_trainer.elements(made)):
        length = (5, 2, 4, 1)[row]
        start = 1 if row == 0 else 0
        assert element.query_tensor.tolist() == made.sequences.ids[row, start:3].tolist()
        assert element.response_tensor.tolist() == made.sequences.ids[row, 3 : 3 + length].tolist()
        assert element.rewards.tolist() == made.rewards[row, :length].tolist()
        assert len(element.logprobs) == len(element.values) == length


@needs_trlx
def test_the_loss_is_trlxs(trlx_trainer, open_trainer):
    """Beside the method that is overridden, with a padding token that no reply holds."""
    trainer = open_trainer(whiten_advantages=True)
    made = experience()
    made.sequences.ids[made.sequences.ids == 0] = 3
    batch = trlx_trainer.ppo_collate_fn("left", -1, trlx_trainer.elements(made))
    with torch.no_grad():
        ours, _ = trainer.loss(batch)
        batch.query_tensors[batch.query_tensors == -1] = 0
        stand_in = SimpleNamespace(
            accelerator=trainer.accelerator, config=trainer.config, model=trainer.model,
            tokenizer=SimpleNamespace(pad_token_id=0),
        )  # fmt: skip
        theirs, _ = trlx_trainer.AcceleratePPOTrainer.loss(stand_in, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)  # float32; log_softmax, and logsumexp of ours


@needs_trlx
def test_a_sampled_padding_token_is_a_token(trlx_trainer, open_trainer):
    """trlx takes it for padding: the mask ends there."""
    trainer, made = open_trainer(), experience()
    batch = trlx_trainer.ppo_collate_fn("left", -1, trlx_trainer.elements(made))
    with torch.no_grad():
        _, statistics = trainer.loss(batch)
    assert statistics["padding_percentage"] == 0


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@needs_trlx
def test_micro_batches_of_equal_replies_do_not_change_an_update(open_trainer):
    """Gradients are means over micro-batches, one update a mini-batch: replies of one length, no whitening."""
    found = []
    for size in (2, 4):
        trainer = open_trainer(micro_batch_size=size)
        before = weights(trainer)
        trainer.set_learning_rate(1e-3)
        row = trainer.train_on(experience(), seed=3)
        found.append((row, weights(trainer)))
        assert any(not before[name].equal(tensor) for name, tensor in found[-1][1].items())
    (one, small), (other, large) = found
    for name in ("policy_loss", "value_loss", "gradient_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, large[name], atol=2e-5, rtol=0)  # Adam moves each weight by up to 1e-3


@needs_trlx
def test_gradients_are_clipped(open_trainer):
    trainer = open_trainer(max_gradient_norm=1e-12, epochs=2)
    before = weights(trainer)
    trainer.set_learning_rate(1e-3)
    row = trainer.train_on(experience(), seed=3)
    assert row["gradient_norm"] > 1e-3
    for name, tensor in weights(trainer).items():  # Adam's epsilon is 1e-8: a gradient of 1e-12 moves by 1e-7
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)


@needs_trlx
def test_the_temperature_is_that_of_sampling(open_trainer, trlx_trainer):
    made, found = experience(), []
    for temperature in (1.0, 2.0):
        trainer = open_trainer(temperature=temperature)
        with torch.no_grad():
            logits, _ = trainer.outputs(made.sequences)
            at = torch.log_softmax(logits[:, 2:-1].double() / temperature, -1)
            exact = at.gather(-1, made.sequences.reply_ids.unsqueeze(-1)).squeeze(-1)
            same = replace(made, log_probs=exact.float())
            batch = trlx_trainer.ppo_collate_fn("left", -1, trlx_trainer.elements(same))
            _, statistics = trainer.loss(batch)
        assert statistics["ratio"].item() == pytest.approx(1, abs=1e-5)  # float32
        found.append(exact)
    assert not torch.allclose(*found)


@needs_trlx
def test_recomputed_layers_are_the_same_update(open_trainer):
    """Though trlx's backward pass is in training mode, and the model has dropout."""
    found = []
    for recomputed in (False, True):
        trainer = open_trainer(recomputed=recomputed, dropout=0.5 * recomputed)
        trainer.set_learning_rate(1e-3)
        row = trainer.train_on(experience(), seed=3)
        found.append((row, weights(trainer)))
    (one, plain), (other, again) = found
    assert one == other
    assert all(again[name].equal(each) for name, each in plain.items())


@needs_trlx
def test_with_lora_the_reference_is_the_source_to_the_bit(world, options_of):
    """Before and after updates; values are those of the policy, though the reference's pass comes between."""
    made, source = experience(), open_source(world.policy)
    options = options_of(lora_rank=4, global_batch_size=4, micro_batch_size=4, epochs=1)
    adapters = Adapters.open(options, source)
    actor, values, reference = ppo_trlx.models(options, source, initialize_distributed(), adapters, None)
    trainer = actor.trainer
    assert not list(reference.parameters())  # no second model
    frozen = {name: each.clone() for name, each in weights(trainer).items() if "lora_" not in name}
    with torch.no_grad():
        wanted = policy_log_probs(load_policy(source, torch.float32), made.sequences, 1.0)
        assert policy_log_probs(actor, made.sequences, 1.0).equal(wanted)  # B is 0
    trainer.set_learning_rate(1e-2)
    for seed in range(2):
        trainer.train_on(made, seed=seed)
        with torch.no_grad():
            trained = policy_log_probs(actor, made.sequences, 1.0)
            assert policy_log_probs(reference, made.sequences, 1.0).equal(wanted)
            assert values(**made.sequences.inputs).equal(trainer.outputs(made.sequences)[1])
        assert (trained - wanted).abs().max() > 0.01
    after = weights(trainer)
    assert all(after[name].equal(each) for name, each in frozen.items() if not name.startswith("v_head."))
    assert not after["v_head.0.weight"].equal(frozen["v_head.0.weight"])
    assert set(actor.full_weights()) == {name for name, _ in actor.module.named_parameters() if "lora_" in name}
