"""Adapters created and merged by PEFT, in rlhf's environment: `python peft_worker.py CASES.json`.

A case is {base, out, lora: LoraConfig's arguments, further options}. Writes `out/adapter/`, and `out/merged/` by
`merge_and_unload` or logits of the model with the unmerged adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

TOKENS = torch.arange(3, 35)[None]
TRAINED = ("lora_", "trainable_tokens_delta", "modules_to_save")  # parts of parameters' names


def make(case: dict[str, Any]) -> None:
    base, out = case["base"], Path(case["out"])

    def load() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, case["dtype"]))
        if rows := case.get("rows"):
            model.resize_token_embeddings(rows)
        return model

    torch.manual_seed(len(case["name"]))
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **case["lora"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
            elif (
                "lora_" in name
                or "trainable_tokens_delta" in name
                or "modules_to_save" in name
                or (name.endswith("bias") and case.get("biases"))
            ):
                parameter += 0.1 * torch.randn_like(parameter)
    if case.get("half"):
        model.half()
    ends = True if case.get("ends") else "auto"  # a multimodal config.json hides its vocab_size from PEFT
    model.save_pretrained(out / "adapter", safe_serialization=not case.get("bin"), save_embedding_layers=ends)
    again = PeftModel.from_pretrained(load(), out / "adapter")
    if case.get("logits"):
        with torch.no_grad():
            save_file({"logits": again(TOKENS).logits.float().contiguous()}, out / "logits.safetensors")
        return
    again.merge_and_unload().save_pretrained(out / "merged")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        make(case)
