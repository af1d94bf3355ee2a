"""LoRA adapters made and computed by PEFT, in the environment of rlhf: `adapter_worker.py MODEL FOLDER`.

Writes the directories FOLDER/one (rank 8), FOLDER/two (rank 4 and 2, rank-stabilised) and FOLDER/rlhf (published by `rlhf dpo`).
Writes FOLDER/said.json: for each, for FOLDER/sft, which is there, and for the base the greedy continuation of the prompt and its
log-probabilities in fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

PROMPT, TOKENS = [5, 9, 33, 70], 16
CONFIGS = {
    "one": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 2}},
}  # fmt: skip


def said(model: torch.nn.Module) -> dict[str, list]:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    reply = ids[0, len(PROMPT) :]
    known = logits[0, len(PROMPT) - 1 :].log_softmax(-1).gather(-1, reply[:, None])[:, 0]
    return {"tokens": reply.tolist(), "log_probabilities": known.tolist()}


def train(source: Path, folder: Path) -> None:
    """FOLDER/rlhf."""
    from tools.rlhf.cli import tool

    pairs = [
        {"prompt": "The quick", "chosen": " brown", "rejected": f" {word}"} for word in ("lazy", "dog", "fox", "over")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = f"dpo --source {source} --data {folder / 'pairs.jsonl'} --target {folder / 'rlhf'} --validation-fraction 0 "
    words += (
        "--global-batch-size 2 --micro-batch-size 2 --precision fp32 --lora-rank 4 --learning-rate 5e-2 --track none"
    )
    try:
        tool.run(words.split())
    except SystemExit as end:
        if end.code:
            raise


def main(source: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    train(source, folder)

    def base():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    answers = {"base": said(base())}
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **config))
        for key, parameter in model.named_parameters():
            if "lora_" in key:  # B is zero at first
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    for name in (*CONFIGS, "sft", "rlhf"):
        answers[name] = said(PeftModel.from_pretrained(base(), folder / name))
    (folder / "said.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
