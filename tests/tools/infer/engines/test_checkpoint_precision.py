"""The default precision is the checkpoint's, from config.json or the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import UserError
from tools.infer.engines.checkpoint_precision import chosen_precision

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "place", [lambda d: {"dtype": d}, lambda d: {"torch_dtype": d}, lambda d: {"text_config": {"dtype": d}}]
)
def test_config_says_it(dtype, place, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"} | place(dtype)))
    assert chosen_precision(tmp_path, None) == DTYPES[dtype]
    for given in DTYPES.values():
        assert chosen_precision(tmp_path, given) == given


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_say_it_where_config_does_not(dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    most = torch.zeros(64, 8, dtype=getattr(torch, dtype))
    few = {str(number): torch.zeros(2, dtype=getattr(torch, name)) for number, name in enumerate(DTYPES)}
    save_file({"most": most, "ids": torch.zeros(4096, dtype=torch.int64), **few}, tmp_path / "model.safetensors")
    assert chosen_precision(tmp_path, None) == DTYPES[dtype]


def test_a_dtype_without_a_name_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float64"}))
    with pytest.raises(UserError, match="config.json says dtype float64; give --precision bf16, fp16, fp32"):
        chosen_precision(tmp_path, None)
