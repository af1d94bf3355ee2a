"""What PEFT's directory of a LoRA adapter holds beside the weights."""

from __future__ import annotations

from typing import Any, Literal

from shared.mapping.adapters import LoraSettings, adapted_linears, peft_targets
from shared.mapping.rule import Table

# The version whose conventions the files follow: before 0.19 PEFT swapped the sides of experts.
PEFT_VERSION = "0.21.2"
Task = Literal["CAUSAL_LM", "SEQ_CLS"]
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def adapter_config(settings: LoraSettings, table: Table, base: str, *, task: Task = "CAUSAL_LM") -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        settings: rank, scale, targets.
        table: tensor table of the base.
        base: path of the base, from the adapter's directory.
        task: PEFT's name of what the model is for.
    """
    linears = adapted_linears(table, settings.targets)
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(entry.transposed for entry in table.entries() if len(entry.stack) < 2),
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        **peft_targets(linears, table),
    }
