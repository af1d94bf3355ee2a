"""In rlhf's environment: an adapter that it has published beside what `convert merge-lora` made of it. BASE ADAPTER MERGED"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tools.rlhf.lora import Adapters
from tools.rlhf.models import open_source
from tools.rlhf.options import Options

base, adapter, merged = map(Path, sys.argv[1:])
config = json.loads((adapter / "adapter_config.json").read_text())
options = Options(source=base, target=base, lora_rank=config["r"])
made = Adapters.open(options, open_source(base)).merged(load_file(adapter / "adapter_model.safetensors"))
stored = load_file(merged / "model.safetensors")
ids = torch.arange(3, 43).reshape(2, 20)
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    peft = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
said = {
    "adapted": len(made),
    "bits": all(torch.equal(stored[name], tensor) for name, tensor in made.items()),
    "gap": (whole - peft).abs().max().item(),
    "effect": (peft - before).abs().max().item(),
}
print(json.dumps(said))
