"""Dtype names of flags (`--precision`, `--dtype`), and of torch, transformers and vLLM."""

from __future__ import annotations

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
TrainingPrecision = Literal["bf16", "fp32"]  # of weights; fp16 would need loss scaling
RunPrecision = Literal["bf16", "fp8", "fp32"]  # fp8: bf16 weights, linear layers in FP8
DTYPES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
