"""Dtype names of flags (`--precision`, `--dtype`), and of torch, transformers and vLLM."""

from __future__ import annotations

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
TrainingPrecision = Literal["bf16", "fp32"]  # fp16 would need loss scaling
DTYPES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
