"""Logits of transformers' models with adapters that PEFT loads, in rlhf's environment: `python peft_logits.py CASES.json`.

A case is {base, adapter, attention, remote}. Writes logits.pt to the adapter's parent, from ids.pt there; PEFT's warnings about
missing or unexpected tensors are errors.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar

from shared.families.common.transformers_workarounds import with_workarounds

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        adapter = Path(case["adapter"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            case["base"],
            dtype=torch.float32,
            attn_implementation=case["attention"],
            trust_remote_code=case["remote"],
        ).eval()
        with_workarounds(model)
        if case[
            "remote"
        ]:  # our references of these families do not generate, and PEFT keeps the method that prepares it
            model.prepare_inputs_for_generation = None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter.*")
            adapted = PeftModel.from_pretrained(model, adapter).eval()
        with (
            torch.no_grad()
        ):  # the model with PEFT's layers: PEFT's own forward passes arguments that our references lack
            logits = adapted.get_base_model()(torch.load(adapter.parent / "ids.pt")).logits
        torch.save(logits, adapter.parent / "logits.pt")
