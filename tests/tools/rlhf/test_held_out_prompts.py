"""`--validation-prompts`: replies over time, the best policy, and that what is trained does not depend on them."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from shared.checkpoint.directory.peft_config import AdapterConfig
from tools.rlhf import held_out_prompts
from tools.rlhf.data import Prompt, read_prompts
from tools.rlhf.engines.deepspeed import initialize_distributed
from tools.rlhf.held_out_prompts import HeldOutPrompts, reply_figures
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.ppo_options import PPOOptions
from tools.rlhf.rollout.in_process import InProcessSampler
from tools.rlhf.rollout.rollout import Reply, Rollout
from tools.rlhf.rollout.sampler import rollout_seed

STARTS = ("colors:", "colors: blue", "colors: red pink", "colors: green", "colors: black")


@pytest.fixture(scope="module")
def questions(world):
    path = world.root / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "disturbance": str(world.order)}) + "\n" for text in STARTS))
    return path


def flags(world, target, **changes):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "target": world.root / target,
        "steps": 4, "max_new_tokens": 16, "learning_rate": 2e-3, "micro_batch_size": 2, "kl_coefficient": 0.01,
        "rollout_batch_size": 8, "global_batch_size": 8, "save_every": 1,
    }  # fmt: skip
    return usual | changes


def measured(questions):
    return {"validation_prompts": questions, "evaluate_every": 2, "keep_best": True}


@pytest.fixture(scope="module")
def trained(world, rlhf, questions):
    target = flags(world, "measured", **measured(questions))
    assert rlhf("ppo", **target) == 0
    return target["target"]


def replies(target):
    return [json.loads(line) for line in (target / "replies.jsonl").read_text().splitlines()]


def share(text):
    return text.split().count("red") / max(1, len(text.split()))


def test_replies_rewards_and_percentiles(trained, metrics):
    rows = replies(trained)
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, n) for step in (0, 2, 4) for n in range(5)]
    assert [row["text"] for row in rows[:5]] == list(STARTS)
    assert all(row["reward"] == pytest.approx(share(row["reply"])) for row in rows)
    logged = metrics(trained)
    assert ["held_out_reward" in row for row in logged] == [False, True, False, True]
    last = sorted(row["reward"] for row in rows[-5:])
    assert logged[-1]["held_out_reward"] == pytest.approx(sum(last) / 5)
    assert [logged[-1][f"held_out_reward_p{n}"] for n in (10, 50, 90)] == [last[0], last[2], last[4]]
    assert logged[-1]["held_out_tokens"] == sum(row["tokens"] for row in rows[-5:]) / 5
    assert logged[-1]["reward_p10"] <= logged[-1]["reward_p50"] <= logged[-1]["reward_p90"]
    page = (trained / "report.html").read_text()
    assert page.count("Held-out prompt ") == 5
    assert page.count("after update 0:") == page.count("after update 4:") == 5
    for title in ("Reward of held-out prompts", "Rewards, 10th to 90th percentile", "Reply length of held-out prompts"):
        assert title in page


def said_by(model, source, questions):
    """What a policy says to the prompts with the seeds of a run, in batches of 2."""
    prompts = read_prompts(questions, source.tokenizer, context_length=96, max_new_tokens=16)
    sampler = InProcessSampler(
        model=model, tokenizer=source.tokenizer, max_new_tokens=16, temperature=1.0,
        eos_ids=source.eos_ids, pad_id=source.pad_id, synced_gpus=False,
    )  # fmt: skip
    said = []
    for start in (0, 2, 4):
        said += sampler.sample(prompts[start : start + 2], seed=rollout_seed(0, 0, start)).replies
    return [reply.text for reply in said]


def test_the_last_replies_are_those_of_the_published_policy(trained, questions):
    source = open_source(trained)
    assert [row["reply"] for row in replies(trained)[-5:]] == said_by(
        load_policy(source, torch.float32), source, questions
    )


def test_the_best_policy_is_published_whole(trained, load_exactly):
    means = {step: sum(row["reward"] for row in replies(trained) if row["step"] == step) / 5 for step in (0, 2, 4)}
    facts = json.loads((trained / "manifest.json").read_text())["facts"]
    best = max(means, key=means.get)
    assert (facts["best_step"], facts["best_held_out_reward"]) == (best, pytest.approx(means[best]))
    load_exactly(AutoModelForCausalLM, trained / "best")
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {
        path.name for path in (trained / "best").iterdir()
    }
    last = (trained / "model.safetensors").read_bytes() == (trained / "best/model.safetensors").read_bytes()
    assert last == (best == 4)
    open_source(trained / "best")  # as any other directory


def test_what_is_trained_does_not_depend_on_it(world, rlhf, trained, metrics):
    target = flags(world, "unmeasured")
    assert rlhf("ppo", **target) == 0
    assert (target["target"] / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    own = [{name: value for name, value in row.items() if "held_out" not in name} for row in metrics(trained)]
    assert own == metrics(target["target"])
    assert not (target["target"] / "replies.jsonl").exists()


def test_a_stopped_run_resumes_to_the_same_replies_and_policy(world, rlhf, trained, questions, monkeypatch):
    """Stopped between the answers and the save that would have kept them."""
    target = flags(world, "measured-again", **measured(questions))
    plain = HeldOutPrompts.evaluate

    def evaluate(self, step):
        row = plain(self, step)
        if step == 2:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(HeldOutPrompts, "evaluate", evaluate)
    assert rlhf("ppo", **target) == 130
    monkeypatch.undo()
    state = target["target"].with_name("measured-again.state")
    assert {row["step"] for row in replies(state)} == {0, 2}
    assert rlhf("ppo", **target) == 0
    for name in ("replies.jsonl", "model.safetensors", "best/model.safetensors"):
        assert (target["target"] / name).read_bytes() == (trained / name).read_bytes(), name


def test_grpo_measures_too_and_trains_the_same(world, rlhf, questions, metrics):
    usual = {
        "source": world.policy, "prompts": world.prompts, "reward": world.reward("disturbed"), "steps": 2, "learning_rate": 1e-3,
        "micro_batch_size": 8, "global_batch_size": 16, "max_new_tokens": 12,
    }  # fmt: skip
    plain, with_it = world.root / "grpo-plain", world.root / "grpo-measured"
    assert rlhf("grpo", **usual, target=plain) == 0
    assert rlhf("grpo", **usual, target=with_it, validation_prompts=questions, keep_best=True) == 0
    assert (plain / "model.safetensors").read_bytes() == (with_it / "model.safetensors").read_bytes()
    assert [row["step"] for row in replies(with_it)] == [0] * 5 + [2] * 5
    last = metrics(with_it)[-1]
    assert last["held_out_reward"] == pytest.approx(sum(row["reward"] for row in replies(with_it)[-5:]) / 5)
    assert (with_it / "best/model.safetensors").is_file()
    assert "Held-out prompt 5" in (with_it / "report.html").read_text()


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_with_lora_replies_are_the_adapters_and_the_best_is_published_as_the_last(world, rlhf, questions, command):
    """PPO with a critic on the same body and an adapter, GRPO merged."""
    target = world.root / f"{command}-lora-measured"
    given = flags(world, target.name, **measured(questions), steps=2, learning_rate=1e-2, lora_rank=4)
    if command == "ppo":
        given |= {"shared_critic": True, "gradient_checkpointing": True}
    else:
        given |= {"publish": "merged"}
        del given["rollout_batch_size"]
    assert rlhf(command, **given) == 0
    source, rows = open_source(world.policy), replies(target)
    facts = json.loads((target / "manifest.json").read_text())["facts"]
    step = facts["best_step"]
    assert step > 0
    assert [row["reply"] for row in rows[:5]] == said_by(load_policy(source, torch.float32), source, questions)
    for place, at in ((target, 2), (target / "best", step)):
        if command == "ppo":
            config = json.loads((place / "adapter_config.json").read_text())
            assert (place / config["base_model_name_or_path"]).resolve() == world.policy.resolve()
            model = PeftModel.from_pretrained(load_policy(source, torch.float32), place).eval()
            AdapterConfig(place)  # as convert merge-lora and infer serve read it
        else:
            model = load_policy(open_source(place), torch.float32)
        assert [row["reply"] for row in rows if row["step"] == at] == said_by(model, source, questions), place
    assert [row["reply"] for row in rows[:5]] != [row["reply"] for row in rows if row["step"] == step]


class Scripted:
    """A policy, its publisher, sampler and reward of given numbers."""

    module = None
    rewards = iter(())

    def publish(self, policy, version):
        self.version = version

    def full_weights(self):
        return {}

    def sample(self, prompts, *, seed):
        self.drawn = torch.rand(1)
        reply = Reply(ids=(1,), text="a", ended=True)
        return Rollout(prompts=tuple(prompts), replies=(reply,) * len(prompts), sequences=None, sampler_log_probs=None)

    def __call__(self, prompts, replies):
        return torch.full((len(replies),), next(self.rewards)), {}


@pytest.fixture
def scripted(world, questions, tmp_path, monkeypatch):
    def write(directory, *rest, **options):
        (directory / "model.safetensors").write_text("weights")

    monkeypatch.setattr(held_out_prompts, "write_policy", write)
    distributed, all_of = initialize_distributed(), Scripted()
    options = PPOOptions(**flags(world, "scripted", steps=10, **measured(questions)))

    def make(*rewards):
        all_of.rewards = iter(rewards)
        prompts = [Prompt(text="a", ids=(2,))] * 3
        found = HeldOutPrompts(
            prompts, options, policy=all_of, publisher=all_of, sampler=all_of, reward=all_of, source=None,
            adapters=None, directory=tmp_path, distributed=distributed,
        )  # fmt: skip
        return found

    return make, tmp_path


def kept(place):
    return sorted(path.name for path in place.glob("best_*"))


def test_the_best_is_kept_until_a_better_one_is_saved(scripted):
    make, place = scripted
    held_out = make(*[0.1] * 2, *[0.5] * 2, *[0.3] * 2, *[0.5] * 2, *[0.7] * 2)  # two chunks of micro_batch_size 2
    held_out.begin(None)
    assert kept(place) == ["best_0000000"]
    for step, best in ((2, 2), (4, 2), (6, 2)):  # of equal ones the first
        held_out.evaluate(step)
        held_out.saved(step)
        assert kept(place) == [f"best_000000{best}"]
    held_out.evaluate(8)
    assert kept(place) == ["best_0000002", "best_0000008"]  # the state of 8 is not saved: a resume needs 2
    again = make(*[0.6] * 2)
    again.begin(6)
    assert kept(place) == ["best_0000002"]
    assert [row["step"] for row in replies(place)] == [step for step in (0, 2, 4, 6) for _ in range(3)]
    again.evaluate(8)
    assert again._best == (8, pytest.approx(0.6))


def test_replies_without_an_opinion_and_generators_left_alone(scripted):
    make, place = scripted
    held_out = make(*[float("nan")] * 2)
    torch.manual_seed(5)
    held_out.begin(None)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    assert [row["reward"] for row in replies(place)] == [None] * 3
    assert kept(place) == []


def test_of_many_replies_the_report_shows_the_first_and_the_last():
    rows = [
        {"step": step, "prompt": 0, "text": "q", "reply": f"<{step}>", "ended": step % 2, "tokens": 3, "reward": 0.5}
        for step in range(40)
    ]
    (figure,) = reply_figures(rows)
    assert figure.count("<dt>") == 16
    assert "&lt;0&gt; ..." in figure
    assert figure.index("after update 39") < figure.index("after update 25") < figure.index("after update 0:")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate_every": 2}, ["--evaluate-every is about --validation-prompts"]),
        ({"keep_best": True}, ["--keep-best is about --validation-prompts"]),
        ({"validation_prompts": "other.jsonl"}, ["other.jsonl has the columns []", "--prompts ['disturbance']"]),
        ({"validation_prompts": "empty.jsonl"}, ["--validation-prompts", "empty.jsonl"]),
    ],
)
def test_mistakes_are_named(world, rlhf, capsys, tmp_path, changes, words):
    (tmp_path / "other.jsonl").write_text('{"prompt": "colors:"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    if "validation_prompts" in changes:
        changes = changes | {"validation_prompts": tmp_path / changes["validation_prompts"]}
    assert rlhf("ppo", **flags(world, "not-measured", **changes)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message
    assert not (world.root / "not-measured").exists()
    assert not (world.root / "not-measured.state").exists()
