"""Phases of a step of `rlhf ppo` and `rlhf grpo`, beside TRL and trlx alone on the same model and batch: `make bench-rlhf`.

    python tests/benchmarks/bench_rlhf.py [--hidden 256] [--layers 4] [--batch 32] [--tokens 32] [--steps 8]
        [--rounds 3] [--record]

One process on one thread, a random LLaMA, prompts of 8 tokens, a reward that counts a word. Of each way the median seconds of a
step after the first two, and of its phases; then the median of the rounds, in each of which every way is measured once:

    publish   the policy to the sampler; in process there is nothing to hand over
    rollout   `generate`
    score     reward functions
    forward   log-probabilities, values and advantages
    update    forward and backward passes, and the optimizer

trlx's ways are there where BATON_TRLX names it. Its own trainer does not start with today's libraries: alone is the class
with what makes it start, without our loop, sampler, state and metrics. GRPO's own check of the sampler's log-probabilities is
part of forward. Overhead is what a step of ours takes longer than the library's alone in the same round: the median, the
least and the most of the rounds. `--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.work import run_in_process  # noqa: E402

PHASES = ("publish", "rollout", "score", "forward", "update")
RESULTS = Path(__file__).with_name("results")
WORDS = ("red", "blue", "green", "yellow", "purple", "orange", "brown", "black", "white", "pink", "gold", "grey")
WARM = 2  # steps that are not counted
REWARD = """
def red(prompts, completions, **columns):
    return [text.split().count("red") / max(1, len(text.split())) for text in completions]
"""
Figures = dict[str, float]


def make_inputs(work: Path, hidden: int, layers: int, words: int = 8) -> None:
    """policy/, prompts.jsonl with prompts of so many words, a token each, and rewards.py."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=256
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(work / "policy")
    tokenizer.save_pretrained(work / "policy")
    rows = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(words)) for row in range(64)]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows), encoding="utf-8")
    (work / "rewards.py").write_text(REWARD, encoding="utf-8")


def medians(rows: Sequence[Figures]) -> Figures:
    """Of the steps after the first ones."""
    counted = rows[WARM:]
    return {name: statistics.median(row[name] for row in counted) for name in ("step", *PHASES)}


def command(given: argparse.Namespace, work: Path, name: str, target: str, **flags: Any) -> None:
    """Run one of our commands in this process."""
    from tools.rlhf.cli import tool

    usual = {
        "source": work / "policy", "prompts": work / "prompts.jsonl", "reward": f"py:{work / 'rewards.py'}:red",
        "target": work / target, "steps": given.steps, "max_new_tokens": given.tokens, "global_batch_size": given.batch,
        "micro_batch_size": given.batch, "learning_rate": 1e-5, "save_every": given.steps, "track": "none",
    }  # fmt: skip
    run_in_process(tool, name, **usual | flags)


def ppo(given: argparse.Namespace, work: Path, backend: str) -> Figures:
    """From metrics.jsonl of a run."""
    target = f"ppo-{backend}"
    command(given, work, "ppo", target, backend=backend, rollout_batch_size=given.batch, epochs=1)
    rows = [json.loads(line) for line in (work / target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return medians([{"step": row["seconds"]} | {name: row[f"seconds_{name}"] for name in PHASES} for row in rows])


class Watch:
    """Seconds of the methods of a trainer, step by step."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []
        self._spent: Figures = {}
        self._began: float | None = None

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

        return call

    def step(self) -> None:
        """A step begins, or the last one has ended."""
        now = time.perf_counter()
        if self._began is not None:
            spent = {name: self._spent.get(name, 0.0) for name in ("collect", "rollout", "score")}
            whole = now - self._began
            row = {"publish": 0.0, "rollout": spent["rollout"], "score": spent["score"]}
            row["forward"] = spent["collect"] - spent["rollout"] - spent["score"]
            self.rows.append(row | {"step": whole, "update": whole - spent["collect"]})
        self._began, self._spent = now, {}

    def watch(self, trainer: Any, methods: dict[str, str]) -> None:
        for method, name in methods.items():
            setattr(trainer, method, self.timed(name, getattr(trainer, method)))


GRPO_METHODS = {"_generate_and_score_completions": "collect", "_generate": "rollout", "_calculate_rewards": "score"}


def watched(kind: Any, watch: Watch) -> Any:
    """A TRL trainer whose steps are timed."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            watch.step()

    class Watched(kind):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            watch.watch(self, GRPO_METHODS)
            self.add_callback(Steps())

    return Watched


def grpo(given: argparse.Namespace, work: Path) -> Figures:
    """`rlhf grpo`."""
    from tools.rlhf.engines import group_trainers

    watch, kind = Watch(), group_trainers.CheckedGRPOTrainer
    group_trainers.CheckedGRPOTrainer = watched(kind, watch)
    try:
        command(given, work, "grpo", "grpo", generations=8)
    finally:
        group_trainers.CheckedGRPOTrainer = kind
    return medians(watch.rows)


def trl_alone(given: argparse.Namespace, work: Path) -> Figures:
    """TRL's GRPOTrainer as its documentation uses it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    scope: dict[str, Any] = {}
    exec(REWARD, scope)
    watch = Watch()
    arguments = GRPOConfig(
        output_dir=str(work / "trl"), per_device_train_batch_size=given.batch, num_generations=8, max_steps=given.steps,
        max_completion_length=given.tokens, learning_rate=1e-5, lr_scheduler_type="constant", report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    prompts = (work / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = watched(GRPOTrainer, watch)(
        model=str(work / "policy"),
        reward_funcs=scope["red"],
        args=arguments,
        train_dataset=Dataset.from_list([json.loads(line) for line in prompts]),
    )
    trainer.train()
    return medians(watch.rows)


def trlx_alone(given: argparse.Namespace, work: Path) -> Figures:
    """trlx's own roll-out, experience, loss and loop."""
    import torch
    from transformers import AutoModelForCausalLM
    from trlx.data.default_configs import default_ppo_config
    from trlx.models.modeling_ppo import AutoModelForCausalLMWithValueHead
    from trlx.pipeline.offline_pipeline import PromptPipeline
    from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer

    from tools.rlhf.engines.trlx_trainer import PolicyWithValueHead, _without_git

    watch = Watch()

    class Wrapped(AutoModelForCausalLMWithValueHead):  # without a frozen head: the trainer makes a reference model
        get_compatible_forward_kwargs = PolicyWithValueHead.get_compatible_forward_kwargs

    class Alone(AcceleratePPOTrainer):
        def get_arch(self, config: Any) -> Any:
            return Wrapped(AutoModelForCausalLM.from_pretrained(work / "policy", dtype=torch.float32))

        def evaluate(self) -> dict[str, float]:
            return {}

        def save_pretrained(self, directory: str | None = None, **named: Any) -> None:
            """Nothing: ours is not counted, either."""

        def save(self, directory: str | None = None, **named: Any) -> None:
            """Nothing."""

        def prepare_learning(self) -> None:
            watch.step()
            super().prepare_learning()

        def post_epoch_callback(self) -> None:
            watch.step()
            super().post_epoch_callback()

    config = default_ppo_config()
    never = 1 << 40
    sections = {
        "train": {"epochs": given.steps, "total_steps": never, "batch_size": given.batch, "seq_length": 8 + given.tokens,
                  "checkpoint_interval": never, "eval_interval": never, "save_best": False, "tracker": None},
        "model": {"model_path": str(work / "policy"), "num_layers_unfrozen": -1},
        "tokenizer": {"tokenizer_path": str(work / "policy")},
        "optimizer": {"name": "adamw", "kwargs": {"lr": 1e-5}},
        "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 1e12, "eta_min": 1e-5}},
        "method": {"num_rollouts": given.batch, "chunk_size": given.batch, "ppo_epochs": 1, "target": None,
                   "gen_kwargs": {"max_new_tokens": given.tokens, "top_k": 0, "top_p": 1.0, "do_sample": True}},
    }  # fmt: skip
    for section, values in sections.items():
        vars(getattr(config, section)).update(values)

    def reward(samples: list[str], prompts: list[str], outputs: list[str], **named: Any) -> list[float]:
        return [text.split().count("red") / max(1, len(text.split())) for text in outputs]

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.nn.parallel.DistributedDataParallel.peft_type = None  # the trainer asks the prepared model for it
    with _without_git():
        trainer = Alone(config, reward_fn=watch.timed("score", reward), stop_sequences=[])
    watch.watch(trainer, {"make_experience": "collect", "generate": "rollout"})
    prompts = [json.loads(line)["prompt"] for line in (work / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    pipeline = PromptPipeline(prompts, 8, trainer.tokenizer)
    trainer.add_prompt_pipeline(pipeline)
    trainer.add_eval_pipeline(pipeline)
    trainer.learn()
    return medians(watch.rows)


WAYS: dict[str, Callable[[argparse.Namespace, Path], Figures]] = {
    "rlhf grpo": grpo,
    "TRL's GRPOTrainer alone": trl_alone,
    "rlhf ppo": lambda given, work: ppo(given, work, "deepspeed"),
    "rlhf ppo --backend trlx": lambda given, work: ppo(given, work, "trlx"),
    "trlx alone": trlx_alone,
}
PAIRS = {"rlhf grpo": "TRL's GRPOTrainer alone", "rlhf ppo --backend trlx": "trlx alone"}


def measure(given: argparse.Namespace) -> list[dict[str, Figures]]:
    """Way -> figures, round by round; each way that is here."""
    import torch

    from tools.rlhf.engines import trlx_package

    torch.set_num_threads(1)
    rounds: list[dict[str, Figures]] = []
    here = [way for way in WAYS if "trlx" not in way or os.environ.get(trlx_package.VARIABLE)]
    for number in range(1, given.rounds + 1):
        found: dict[str, Figures] = {}
        with tempfile.TemporaryDirectory(prefix="bench-rlhf-") as folder:
            make_inputs(Path(folder), given.hidden, given.layers)
            for way in here:
                print(f"round {number}: {way}", file=sys.stderr, flush=True)
                found[way] = WAYS[way](given, Path(folder))
        rounds.append(found)
    return rounds


def typical(rounds: Sequence[dict[str, Figures]]) -> dict[str, Figures]:
    """Way -> figures, each the median of the rounds."""
    return {
        way: {name: statistics.median(found[way][name] for found in rounds) for name in figures}
        for way, figures in rounds[0].items()
    }


def overheads(rounds: Sequence[dict[str, Figures]]) -> dict[str, Figures]:
    """What a step of ours takes longer than the library's alone, as a fraction of it."""
    shares = {
        ours: [found[ours]["step"] / found[alone]["step"] - 1 for found in rounds]
        for ours, alone in PAIRS.items()
        if {ours, alone} <= {*rounds[0]}
    }
    return {
        ours: {"median": statistics.median(each), "least": min(each), "most": max(each)}
        for ours, each in shares.items()
    }


def table(rounds: Sequence[dict[str, Figures]]) -> str:
    """Markdown, in milliseconds."""
    found = typical(rounds)
    lines = [f"| ms a step | step | {' | '.join(PHASES)} |", "|---|---|" + "---|" * len(PHASES)]
    lines += [
        f"| {way} | {1e3 * figures['step']:,.0f} | {' | '.join(f'{1e3 * figures[name]:,.1f}' for name in PHASES)} |"
        for way, figures in found.items()
    ]
    lines.append("")
    for ours, share in overheads(rounds).items():
        lines.append(f"{ours}: {share['median']:+.0%} of {PAIRS[ours]} ({share['least']:+.0%} to {share['most']:+.0%})")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib import metadata

    packages = ("torch", "transformers", "trl", "deepspeed", "accelerate")
    return {
        "device": "CPU",
        "cores": os.cpu_count(),
        "threads": 1,
        **{name: metadata.version(name) for name in packages},
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rounds = measure(given)
    print(f"{machine()}\n\n{table(rounds)}", flush=True)
    if given.record:
        settings = {name: getattr(given, name) for name in ("hidden", "layers", "batch", "tokens", "steps", "rounds")}
        content = {
            "machine": machine(),
            "settings": settings,
            "seconds": typical(rounds),
            "overheads": overheads(rounds),
        }
        path = given.results / "rlhf-cpu.json"
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
