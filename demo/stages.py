"""The stages of the demo, in order: each is one command on directories, with a one-line summary of its result.

Paths in the commands are relative to the repository root. Standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import metrics
from data import MAX_NEW_TOKENS, TEMPERATURE

# Sized for two cores and a quarter of an hour. With so little compute, many small updates of a small model work best.
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 512
PRETRAIN_STEPS = 800
SFT_EPOCHS = 5
PPO_STEPS = 30
CONTROL_STEPS = 20  # of PPO at learning rate 0
SCORED = ("init", "pretrained", "sft", "ppo")  # the evaluated models, in order


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command."""

    name: str
    command: tuple[str, ...]
    output: Path
    says: Callable[[], str]
    """One-line summary of the result, read from the output."""


def precision() -> str:
    """bf16 if the processor has bf16 instructions, else fp32, which is then faster."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def tool(name: str, *words: object) -> tuple[str, ...]:
    """A tool's command line."""
    return (f"tools/{name}/.venv/bin/{name}", *map(str, words))


def script(path: str, *words: object) -> tuple[str, ...]:
    """The command line of a script of this folder, with the interpreter of this process."""
    root = Path(__file__).resolve().parents[1]
    python = Path(sys.executable)  # not resolved: a virtual environment's interpreter is a link
    python = python.relative_to(root) if python.is_relative_to(root) else python
    return (str(python), f"demo/{path}", *map(str, words))


def stages(work: Path) -> list[Stage]:
    """Every stage, with its paths under `work`."""
    data = work / "data"
    return [
        Stage(
            name="data",
            command=script("data.py", data),
            output=data,
            says=lambda: "the standard library's source, modules held out",
        ),
        *_base(work, data),
        *_pretraining(work, data),
        *_fine_tuning(work, data),
        *_alignment(work, data),
        Stage(
            name="serve and ask",
            command=script(
                "serve.py",
                *tool("infer", "serve", "--source", work / "ppo", "--port", 0),
                *("--", data / "prompts-heldout.jsonl", work / "answer.json"),
            ),
            output=work / "answer.json",
            says=lambda: "one question answered over HTTP",
        ),
    ]


def _base(work: Path, data: Path) -> list[Stage]:
    return [
        Stage(
            name="pretrain tokenizer",
            command=tool(
                *("pretrain", "tokenizer", "--source", data / "train", "--target", work / "tokenizer"),
                *("--vocab-size", VOCAB_SIZE),
            ),
            output=work / "tokenizer",
            says=lambda: f"{metrics.facts(work / 'tokenizer')['vocab_size']} tokens",
        ),
        Stage(
            name="convert init",
            command=tool(
                *("convert", "init", "--model-config", "demo/model.json", "--tokenizer", work / "tokenizer"),
                *("--dtype", "fp32", "--target", work / "init"),
            ),
            output=work / "init",
            says=lambda: f"{metrics.facts(work / 'init')['parameters'] / 1e6:.1f} M parameters",
        ),
        *to_megatron(work / "init", work / "init-mg", certificate=work / "certificate.json"),
    ]


def to_megatron(source: Path, target: Path, *, certificate: Path) -> list[Stage]:
    """Conversion from Hugging Face to Megatron-Core, and its proof."""
    return [
        Stage(
            name="convert to-megatron",
            command=tool("convert", "to-megatron", "--source", source, "--target", target),
            output=target,
            says=lambda: "",
        ),
        Stage(
            name="convert verify",
            command=tool(
                *("convert", "verify", "--source", source, "--target", target), *("--certificate", certificate)
            ),
            output=certificate,
            says=lambda: "round trip exact, logits agree",
        ),
    ]


def _pretraining(work: Path, data: Path) -> list[Stage]:
    corpus = work / "corpus"
    return [
        Stage(
            name="pretrain prepare",
            command=tool(
                *("pretrain", "prepare", "--source", data / "train", "--validation", data / "heldout.jsonl"),
                *("--tokenizer", work / "tokenizer", "--target", corpus),
            ),
            output=corpus,
            says=lambda: f"{metrics.facts(corpus)['splits']['train']['tokens'] / 1e6:.2f} M tokens",
        ),
        Stage(
            name="unigram models",
            command=script("unigram.py", corpus, data / "train", data / "heldout.jsonl", work / "unigram.json"),
            output=work / "unigram.json",
            says=lambda: "what a model has to beat",
        ),
        _evaluate(work, data, "init"),
        Stage(
            name="pretrain train",
            command=tool(
                *("pretrain", "train", "--source", work / "init-mg", "--data", corpus),
                *("--target", work / "pretrained-mg", "--sequence-length", SEQUENCE_LENGTH),
                *("--steps", PRETRAIN_STEPS, "--global-batch-size", 4, "--micro-batch-size", 4),
                *("--learning-rate", "4e-3", "--min-learning-rate", "1e-4", "--warmup-steps", 40),
                *("--precision", precision(), "--save-every", 100, "--validate-every", 0, "--log-every", 50),
            ),
            output=work / "pretrained-mg",
            says=lambda: loss_fell(work / "pretrained-mg"),
        ),
        _to_hf(work, "pretrained"),
        _evaluate(work, data, "pretrained"),
    ]


def _fine_tuning(work: Path, data: Path) -> list[Stage]:
    conversations = work / "conversations"
    return [
        Stage(
            name="sft prepare",
            command=tool(
                *("sft", "prepare", "--source", data / "sft.jsonl", "--validation", data / "sft-heldout.jsonl"),
                *("--tokenizer", work / "tokenizer", "--target", conversations),
                *("--sequence-length", SEQUENCE_LENGTH),
            ),
            output=conversations,
            says=lambda: f"{metrics.facts(conversations)['splits']['train']['conversations']} conversations",
        ),
        Stage(
            name="sft train",
            command=tool(
                *("sft", "train", "--source", work / "pretrained-mg", "--data", conversations),
                *("--target", work / "sft-mg", "--epochs", SFT_EPOCHS, "--global-batch-size", 4),
                *("--micro-batch-size", 4, "--learning-rate", "1e-3", "--warmup-steps", 10),
                *("--precision", precision(), "--save-every", 100, "--validate-every", 0, "--log-every", 50),
            ),
            output=work / "sft-mg",
            says=lambda: loss_fell(work / "sft-mg"),
        ),
        _to_hf(work, "sft"),
        _evaluate(work, data, "sft"),
    ]


def _alignment(work: Path, data: Path) -> list[Stage]:
    return [
        Stage(
            name="rlhf reward",
            command=tool(
                *("rlhf", "reward", "--source", work / "sft", "--data", data / "preferences.jsonl"),
                *("--target", work / "reward", "--learning-rate", "3e-4", "--micro-batch-size", 32),
            ),
            output=work / "reward",
            says=lambda: reward_accuracy(work / "reward"),
        ),
        _ppo(work, data, "ppo", 3, "--steps", PPO_STEPS, "--learning-rate", "1e-4"),
        _ppo(
            work, data, "ppo-control", CONTROL_STEPS // 2, "--steps", CONTROL_STEPS, "--learning-rate", 0, "--epochs", 1
        ),
        _evaluate(work, data, "ppo"),
    ]


def _ppo(work: Path, data: Path, name: str, window: int, *words: object) -> Stage:
    """PPO on the reward model and the verifiable reward; with learning rate 0 a control, whose reward must stay flat."""
    return Stage(
        name="rlhf ppo" if name == "ppo" else "rlhf ppo (control)",
        command=tool(
            *("rlhf", "ppo", "--source", work / "sft", "--prompts", data / "prompts.jsonl"),
            *("--reward", f"0.1*model:{work / 'reward'},py:demo/reward.py:parses", "--target", work / name),
            *("--max-new-tokens", MAX_NEW_TOKENS, "--temperature", TEMPERATURE, "--micro-batch-size", 32, *words),
        ),
        output=work / name,
        says=lambda: reward_moved(work / name, window),
    )


def _to_hf(work: Path, name: str) -> Stage:
    return Stage(
        name=f"convert to-hf ({name})",
        command=tool("convert", "to-hf", "--source", work / f"{name}-mg", "--target", work / name),
        output=work / name,
        says=lambda: "",
    )


def _evaluate(work: Path, data: Path, name: str) -> Stage:
    """Held-out bits per byte, and the share of replies to held-out requests that parse."""
    scores = work / "scores" / name
    return Stage(
        name=f"infer evaluate ({name})",
        command=tool(
            *("infer", "evaluate", "--source", work / name, "--tasks", data / "tasks", "--target", scores),
            "--apply-chat-template",
        ),
        output=scores,
        says=lambda: (
            f"{metrics.bits_per_byte(scores):.3f} bits per byte, {metrics.parse_rate(scores):.1%} of replies parse, "
            f"{metrics.reply_length(scores):.0f} characters each"
        ),
    )


def loss_fell(run: Path, last: int = 20) -> str:
    """Training loss of the first update, and mean of the last ones."""
    losses = metrics.curve(run, "loss")
    return f"loss {losses[0]:.2f} -> {sum(losses[-last:]) / len(losses[-last:]):.2f}"


def reward_accuracy(directory: Path) -> str:
    """Accuracy of the reward model on held-out pairs, before and after training."""
    facts = metrics.facts(directory)
    return f"accuracy {facts['accuracy_before']:.2f} -> {facts['accuracy_after']:.2f} on pairs held out"


def reward_moved(directory: Path, window: int) -> str:
    """Mean verifiable reward and length of the first and the last `window` iterations."""
    parsed, tokens = (ends(directory, key, window) for key in ("reward/parses", "reply_tokens"))
    drift = metrics.curve(directory, "kl_reply")
    return (
        f"roll-outs that parse {parsed[0]:.1%} -> {parsed[1]:.1%}, {tokens[0]:.0f} -> {tokens[1]:.0f} tokens each, "
        f"KL a reply {drift[-1]:.2f}"
    )


def ends(directory: Path, key: str, window: int) -> tuple[float, float]:
    """Mean of a metric over the first and over the last `window` lines."""
    values = metrics.curve(directory, key)
    return sum(values[:window]) / window, sum(values[-window:]) / window
