"""`--lora-rank`: what is published is PEFT's and merges to the bit, the reference is the adapter off, runs resume exactly."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shared.checkpoint.directory.open import open_checkpoint
from tools.rlhf.algorithms.experience import policy_log_probs
from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, initialize_distributed
from tools.rlhf.lora import AdapterOff, Adapters
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.options import DPOOptions
from tools.rlhf.rollout.directory_publisher import DirectoryPublisher
from tools.rlhf.rollout.rollout import Sequences

RANK = 4


def dpo_flags(world, target, **changes):
    usual = {"source": world.policy, "data": world.pairs, "target": world.root / target, "learning_rate": 5e-3}
    return usual | {"epochs": 0.6, "save_every": 2, "validation_fraction": 0, "lora_rank": RANK} | changes


def ppo_flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": 5, "max_new_tokens": 12, "learning_rate": 8e-3, "micro_batch_size": 16, "kl_coefficient": 0.01,
        "rollout_batch_size": 32, "global_batch_size": 16, "save_every": 1, "lora_rank": RANK,
    }  # fmt: skip
    return usual | changes


@pytest.fixture(scope="module")
def adapter(world, rlhf):
    assert rlhf("dpo", **dpo_flags(world, "dpo-lora")) == 0
    return world.root / "dpo-lora"


def in_peft(world, adapter, kind=AutoModelForCausalLM, **arguments):
    return PeftModel.from_pretrained(kind.from_pretrained(world.policy, **arguments), adapter).eval()


def test_an_adapter_is_pefts_and_of_the_contract(world, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 2 * RANK)
    assert (adapter / config["base_model_name_or_path"]).resolve() == world.policy.resolve()
    assert open_checkpoint(adapter, kinds=("adapter",), flag="--adapter").facts["lora_rank"] == RANK
    assert "base_model_relation: adapter" in (adapter / "README.md").read_text()
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7  # A and B, layers, matrices of a layer
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    model = in_peft(world, adapter)
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, stored[name.replace(".default", "")])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert (model(ids).logits - base).abs().max() > 0.1


def exactly_merged(world, tensors):
    """The source with `W + scale * B @ A` in float64, rounded once: scale 2, W in float32."""
    weights = load_file(world.policy / "model.safetensors")
    changed = set()
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")]
            plain = name.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
            weights[plain] = (weights[plain].double() + 2.0 * (b.double() @ a.double())).float()
            changed.add(plain)
    assert len(changed) == 14
    return weights


def test_merged_it_is_the_exact_sum_rounded_once(world, rlhf, adapter):
    """The same run with `--publish merged`. `tests/pipeline` compares the sum with `convert merge-lora`."""
    target = world.root / "dpo-merged"
    assert rlhf("dpo", **dpo_flags(world, target, publish="merged")) == 0
    ours, wanted = (
        load_file(target / "model.safetensors"),
        exactly_merged(world, load_file(adapter / "adapter_model.safetensors")),
    )
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)
    before, after = (json.loads((place / "config.json").read_text()) for place in (world.policy, target))
    assert before.items() <= after.items()
    # float32: the adapter is added after the product, or before.
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = AutoModelForCausalLM.from_pretrained(target)(ids).logits - in_peft(world, adapter)(ids).logits
    assert gap.abs().max() < 1e-4


@pytest.fixture(scope="module")
def engine(world):
    distributed = initialize_distributed()
    options = DPOOptions(source=world.policy, data=world.pairs, target=world.root / "none", lora_rank=RANK)
    source = open_source(world.policy)
    adapters = Adapters.open(options, source)
    model = adapters.attach(load_policy(source, torch.float32), seed=0)
    made = EngineOptions(zero=0, precision="fp32", micro_batch_size=4, accumulation=1, max_gradient_norm=1.0)
    return DeepSpeedEngine(model, made, distributed), adapters, source


def test_the_reference_is_the_source_to_the_bit(world, engine):
    engine, _, source = engine
    plain = load_policy(source, torch.float32)
    reference = AdapterOff(engine)
    assert not list(reference.parameters())  # no second model
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (4, 14), generator=generator)
    sequences = Sequences(ids=ids, attention_mask=torch.ones_like(ids), reply_mask=torch.ones(4, 8))
    with torch.no_grad():
        wanted = policy_log_probs(plain, sequences, 1.0)
        before = policy_log_probs(engine, sequences, 1.0)
    assert torch.equal(before, wanted)  # B is 0
    engine.set_learning_rate(1e-2)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(policy_log_probs(reference, sequences, 1.0), wanted)
        engine.backward(-policy_log_probs(engine, sequences, 1.0).mean())
        engine.step()
    with torch.no_grad():
        assert torch.equal(policy_log_probs(reference, sequences, 1.0), wanted)
        assert (policy_log_probs(engine, sequences, 1.0) - wanted).abs().max() > 0.1


def test_servers_are_given_the_merged_policy(world, engine, tmp_path):
    class Servers:
        addresses = ("http://one",)

        def publish(self, path, version, *, to):
            self.weights = load_file(path / "model.safetensors")

    engine, adapters, source = engine
    servers = Servers()
    (tmp_path / "run").mkdir()
    DirectoryPublisher(tmp_path / "run", source, servers, adapters).publish(engine, 3)
    wanted = exactly_merged(world, adapters.tensors(engine.module, engine.full_weights()))
    assert servers.weights.keys() == wanted.keys()
    assert all(torch.equal(servers.weights[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def ppo(world, rlhf):
    assert rlhf("ppo", **ppo_flags(world, "ppo-lora")) == 0
    return world.root / "ppo-lora"


def test_ppo_resumes_to_the_same_adapter_without_the_frozen_weights_in_its_state(world, rlhf, ppo, metrics):
    target = ppo_flags(world, "ppo-lora-stopped")
    world.order.write_text(str(int(signal.SIGUSR1)))
    assert rlhf("ppo", **target) == 75
    state = target["target"].with_name("ppo-lora-stopped.state")
    saved = sum(path.stat().st_size for path in state.rglob("*.pt"))
    # Policy and critic: A and B of 2 layers, the critic's head; weights and two moments of Adam, 4 bytes each.
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64)
    trained = 2 * 2 * RANK * sides + 64
    assert 12 * trained < saved < 12 * trained + 100_000, saved  # pickles: names, settings
    frozen = 4 * sum(tensor.numel() for tensor in load_file(world.policy / "model.safetensors").values())
    assert saved < frozen
    assert rlhf("ppo", **target) == 0
    assert metrics(target["target"]) == metrics(ppo)
    files = [place / "adapter_model.safetensors" for place in (target["target"], ppo)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ppo_learns_and_starts_at_the_reference(ppo, metrics):
    rows = metrics(ppo)
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl_reply"] > 0.1
    assert rows[-1]["reward"] > 1.3 * rows[0]["reward"]
    assert max(row["log_prob_gap"] for row in rows) < 1e-5


def test_grpo_takes_the_adapter_off_for_its_reference(world, rlhf, metrics, monkeypatch):
    from tools.rlhf.algorithms import group_training

    made = []
    whole = group_training.train
    monkeypatch.setattr(
        group_training, "train", lambda trainer, *rest: (made.append(trainer), whole(trainer, *rest))[1]
    )
    flags = ppo_flags(world, "grpo-lora", steps=3, kl_coefficient=0.02)
    flags = {name: value for name, value in flags.items() if name != "rollout_batch_size"}
    assert rlhf("grpo", **flags, publish="merged") == 0
    assert made[0].ref_model is None
    assert list(made[0].model.peft_config) == ["default"]
    rows = metrics(world.root / "grpo-lora")
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl"] > 0
    assert max(row["log_prob_gap"] for row in rows) < 1e-5
    before, after = (load_file(place / "model.safetensors") for place in (world.policy, world.root / "grpo-lora"))
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 14


def trained_numbers(*, head):
    """A and B of 2 layers, and the head of a reward model."""
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64)
    return 2 * RANK * sides + 64 * head


@pytest.mark.parametrize("command", ["dpo", "kto", "reward", "grpo"])
def test_the_state_is_what_is_trained_and_a_stopped_run_goes_on(command, world, rlhf, metrics, signalled):
    """Weights and two moments of Adam, 4 bytes each. KTO's resumed run is compared with a whole one."""
    target = world.root / f"state-{command}"
    flags = dpo_flags(world, target, epochs=0.2 if command == "kto" else 0.3)
    if command == "grpo":
        flags = ppo_flags(world, target, steps=3, reward=world.reward("red"))
        del flags["rollout_batch_size"]
    signalled(2)
    assert rlhf(command, **flags) == 75
    checkpoint = target.with_name(f"state-{command}.state") / "trainer" / "checkpoint-2"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    wanted = trained_numbers(head=command == "reward")
    assert sum(tensor.numel() for tensor in stored.values()) == wanted
    assert [name for name in stored if "lora_" not in name] == ["base_model.model.score.weight"] * (command == "reward")
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert sum(each[name].numel() for each in moments) == wanted
    kinds = (".safetensors", ".pt", ".pth", ".bin")
    saved = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.suffix in kinds)
    assert 12 * wanted < saved < 12 * wanted + 60_000, saved  # names, settings, generators
    assert rlhf(command, **flags) == 0
    assert open_checkpoint(target, kinds=("adapter",), flag="--adapter").facts["updates"] == 3
    if command == "kto":
        whole = world.root / "state-kto-whole"
        assert rlhf(command, **flags | {"target": whole}) == 0
        assert metrics(whole) == metrics(target)
        files = [place / "adapter_model.safetensors" for place in (whole, target)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def bf16_policy(world):
    """The policy with its weights in bf16."""
    path = shutil.copytree(world.policy, world.root / "policy-bf16")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return path


def test_kto_trains_an_adapter_of_a_bf16_source_and_rounds_the_sum_once(
    world, bf16_policy, rlhf, metrics, trainers, sampled_red, monkeypatch
):
    """Trained in fp32 on frozen weights that are bf16's numbers; the merged model samples what is desirable."""
    merged, given = Adapters.merged, {}
    monkeypatch.setattr(Adapters, "merged", lambda self, tensors: (given.update(tensors), merged(self, tensors))[1])
    target = world.root / "kto-merged"
    assert rlhf("kto", **dpo_flags(world, target, source=bf16_policy, publish="merged", epochs=1)) == 0
    first = metrics(target)[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)  # the reference is the adapter off: r and z are 0
    assert [trainer.ref_model for trainer in trainers] == [None]
    assert sampled_red(target) > 1.5 * sampled_red(bf16_policy)
    before, after = (load_file(place / "model.safetensors") for place in (bf16_policy, target))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed, twice = 0, 0
    for name, b in given.items():
        if not name.endswith("lora_B.weight"):
            continue
        plain = name.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
        delta = 2.0 * (b.double() @ given[name.replace("lora_B", "lora_A")].double())
        weight, made = before.pop(plain), after.pop(plain)
        exact = weight.double() + delta
        bits, gap = made.view(torch.int16), (made.double() - exact).abs()
        for step in (-1, 1):  # no neighbour in bf16 is nearer to the exact sum
            assert not (gap > ((bits + step).view(torch.bfloat16).double() - exact).abs()).any(), plain
        twice += not torch.equal(made, weight + delta.bfloat16())  # the delta rounded before, as well
        changed += 1
    assert changed == twice == 14
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_acts_in_training_alone_and_resumes(world, rlhf, adapter, metrics, signalled):
    target = dpo_flags(world, "dropout", lora_dropout=0.2)
    signalled(2)
    assert rlhf("dpo", **target) == 75
    assert rlhf("dpo", **target) == 0
    whole = dpo_flags(world, "dropout-whole", lora_dropout=0.2)
    assert rlhf("dpo", **whole) == 0
    assert metrics(target["target"]) == metrics(whole["target"]) != metrics(adapter)
    one, two = (each["target"] / "adapter_model.safetensors" for each in (target, whole))
    assert one.read_bytes() == two.read_bytes()


def test_a_reward_model_has_its_head_in_either_form(world, rlhf, capsys):
    flags = {"source": world.policy, "data": world.pairs, "learning_rate": 1e-2, "lora_rank": RANK, "rslora": True}
    for name, publish in (("reward-lora", "adapter"), ("reward-merged", "merged")):
        assert rlhf("reward", **flags, target=world.root / name, publish=publish) == 0
    adapter, merged = world.root / "reward-lora", world.root / "reward-merged"
    assert "base_model.model.score.weight" in load_file(adapter / "adapter_model.safetensors")
    peft = in_peft(world, adapter, AutoModelForSequenceClassification, num_labels=1, pad_token_id=0)
    whole = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert whole.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = [json.loads(line) for line in world.pairs.read_text().splitlines()[:40]]
    scores = []
    for model in (peft, whole):
        with torch.no_grad():
            scores.append(
                [model(**ids(tokenizer, row, side)).logits.item() for row in rows for side in ("chosen", "rejected")]
            )
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # float32: the adapter is added after the product, or before
    assert sum(chosen > rejected for chosen, rejected in zip(scores[1][::2], scores[1][1::2], strict=True)) >= 34
    calibrated = [
        {
            name: open_checkpoint(place, kinds=(kind,), flag="").facts[name]
            for name in ("brier", "expected_calibration_error")
        }
        for place, kind in ((adapter, "adapter"), (merged, "hf"))
    ]
    assert calibrated[0] == calibrated[1]  # the same training
    assert 0 < calibrated[0]["brier"] < 0.25
    assert rlhf("score", source=merged, data=world.pairs, target=world.root / "lora-scores") == 0
    scored = [json.loads(line) for line in (world.root / "lora-scores/scores.jsonl").read_text().splitlines()[:40]]
    said = [row[f"reward_{side}"] for row in scored for side in ("chosen", "rejected")]
    assert said == pytest.approx(scores[1], abs=1e-5)  # padded, in float32
    assert rlhf("score", source=adapter, data=world.pairs, target=world.root / "refused-scores") == 2
    assert "merge" in capsys.readouterr().err.strip().splitlines()[-1]


def ids(tokenizer, row, side):
    encoded = tokenizer(row["prompt"] + row[side], return_tensors="pt")["input_ids"]
    return {"input_ids": torch.cat([encoded, torch.tensor([[tokenizer.eos_token_id]])], dim=1)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_rank": None, "lora_alpha": 8}, "--lora-alpha belongs to LoRA"),
        ({"lora_rank": None, "lora_dropout": 0.1}, "--lora-dropout belongs to LoRA"),
        ({"lora_rank": None, "publish": "merged"}, "--publish belongs to LoRA"),
        ({"lora_targets": "query"}, "the model has no linear layer query"),
    ],
)
def test_wrong_flags_are_one_line(world, rlhf, capsys, flags, words):
    given = {name: value for name, value in dpo_flags(world, "refused-lora", **flags).items() if value is not None}
    assert rlhf("dpo", **given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert not (world.root / "refused-lora").exists()


def test_adapters_under_sharded_weights(world, process, metrics):
    """ZeRO-3 in two processes: frozen and trained weights are cut, the reference is still the source."""
    questions = world.root / "three.jsonl"
    questions.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:3]))
    measured = {"validation_prompts": questions, "keep_best": True}
    done = process(
        "ppo",
        **ppo_flags(
            world,
            "ppo-lora-zero",
            zero=3,
            processes=2,
            micro_batch_size=8,
            steps=2,
            rollout_batch_size=16,
            max_new_tokens=6,
        ),
        **measured,
    )
    assert done.returncode == 0, done.stderr
    rows = metrics(world.root / "ppo-lora-zero")
    assert rows[0]["kl"] == 0.0
    assert abs(rows[1]["kl"]) > 0
    assert max(row["log_prob_gap"] for row in rows) < 1e-5
    stored = load_file(world.root / "ppo-lora-zero" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in stored.values())
    best = load_file(world.root / "ppo-lora-zero" / "best" / "adapter_model.safetensors")
    assert {name: each.shape for name, each in best.items()} == {name: each.shape for name, each in stored.items()}
    assert json.loads((world.root / "ppo-lora-zero" / "replies.jsonl").read_text().splitlines()[-1])["prompt"] == 2
