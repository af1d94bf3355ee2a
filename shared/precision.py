"""Number formats as flags name them (`--precision`, `--dtype`), and as torch, transformers and vLLM do."""

from __future__ import annotations

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
TrainingPrecision = Literal["bf16", "fp32"]  # fp16 would need loss scaling
DTYPES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
