"""What TRL's SFTTrainer makes of packed rows, in rlhf's environment: `python trl_reference.py DIRECTORY`.

DIRECTORY/models.json: by name config.json. Writes DIRECTORY/<name>/hf and, with `lora`, the adapter DIRECTORY/<name>/adapter that
PEFT starts from, A and B random. DIRECTORY/updates.json: the rows of each update, of each row its conversations, as tokens and
labels (the next token or -100). DIRECTORY/cases.json: by name {model, lora, options}. Writes DIRECTORY/results.json: by case the
losses and gradient norms of the updates.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

WITHOUT_POSITIONS = {"bloom"}  # classes that know no packed rows: each conversation is a row of its own


def make(directory: Path, config: dict, lora: dict) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float()
    model.save_pretrained(directory / "hf")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(directory / "adapter")


def examples(update: list, *, packed: bool) -> list[dict]:
    """The rows as SFTTrainer takes them: labels at the place of their own token."""
    parts = [
        [{"input_ids": ids, "labels": [-100, *labels[:-1]]} for ids, labels in conversations]
        for conversations in update
    ]
    if not packed:
        return [part for row in parts for part in row]
    return [
        {
            "input_ids": [token for part in row for token in part["input_ids"]],
            "labels": [label for part in row for label in part["labels"]],
            "seq_lengths": [len(part["input_ids"]) for part in row],
        }
        for row in parts
    ]


def train(directory: Path, name: str, updates: list, *, lora: bool, options: dict) -> list[list[float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    packed = model.config.model_type not in WITHOUT_POSITIONS
    given = [examples(update, packed=packed) for update in updates]
    (size,) = {len(update) for update in given}
    vocabulary = {f"<{token}>": token for token in range(model.config.vocab_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), pad_token="<0>", eos_token="<1>"
    )
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, directory / "adapter", is_trainable=True) if lora else model,
        args=SFTConfig(
            output_dir=str(directory / name),
            per_device_train_batch_size=size,
            max_steps=len(updates),
            padding_free=packed,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list([row for update in given for row in update]),
        processing_class=tokenizer,
    )
    trainer.train()
    return [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "grad_norm" in row]


if __name__ == "__main__":
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, given in json.loads((folder / "models.json").read_text()).items():
        make(folder / name, **given)
    steps = json.loads((folder / "updates.json").read_text())
    cases = json.loads((folder / "cases.json").read_text())
    results = {
        name: train(folder / case["model"], name, steps, lora=case["lora"], options=case["options"])
        for name, case in cases.items()
    }
    (folder / "results.json").write_text(json.dumps(results))
