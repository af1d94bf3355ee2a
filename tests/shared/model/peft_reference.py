"""What PEFT and transformers make of LoRA, in rlhf's environment: `python peft_reference.py DIRECTORY`.

DIRECTORY/cases.json: by name {config: of config.json, lora: LoraConfig's arguments}. Writes the base DIRECTORY/<name>/hf, the
adapter it starts from (`adapter`, A and B random), the gradients of the first update, losses and gradient norms of three
updates, and the adapter after them (`after`).
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

UPDATES, BATCH, RATE, BETAS = 3, 8, 1e-2, (0.9, 0.95)


def rows(first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels: the samples of `Words` in layouts_worker.py."""
    samples = torch.stack([(torch.arange(25) * (1 + place % 11)) % 13 for place in range(first, first + BATCH)])
    return samples[:, :-1], samples[:, 1:]


def run(directory: Path, config: dict, lora: dict) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float()
    base.save_pretrained(directory / "hf")
    model = get_peft_model(base.eval(), LoraConfig(task_type="CAUSAL_LM", **lora))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory / "adapter")
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=BETAS, eps=1e-8, weight_decay=0.0)
    numbers = []
    for step in range(UPDATES):
        tokens, labels = rows(BATCH * step)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name.replace(".default", ""): each.grad.contiguous() for name, each in trained.items()}
            save_file(gradients, directory / "gradients.safetensors")
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        numbers.append([loss.item(), norm.item()])
    (directory / "numbers.json").write_text(json.dumps(numbers))
    model.save_pretrained(directory / "after")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        run(folder / name, **case)
