"""A config.json that promises quantised weights is not written beside plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.families import registry
from tools.convert.quantization_fields import without_quantization

_SCHEMES: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "per-tensor fp8": {"quant_method": "fp8", "activation_scheme": "static"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
}


def test_every_place_of_a_config_json() -> None:
    config = {
        "hidden_size": 8,
        "quantization_config": {"bits": 4},
        "quantization_bit": 0,
        "text_config": {"vocab_size": 3, "quantization_config": {"bits": 4}, "compression_config": None},
    }
    assert without_quantization(config) == (
        {"hidden_size": 8, "text_config": {"vocab_size": 3}},
        ["quantization_config", "text_config.quantization_config"],
    )


@pytest.mark.parametrize("scheme", _SCHEMES)
@pytest.mark.parametrize("size", ["qwen3-tiny", "gpt-oss-tiny"])
def test_init_of_a_quantised_config_loads_as_plain_weights(
    convert: Any, tmp_path: Path, size: str, scheme: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = registry.to_config(registry.sizes()[size]) | {"quantization_config": _SCHEMES[scheme]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = convert("init", "--model-config", tmp_path / "config.json", "--target", tmp_path / "new")
    assert done.code == 0, done.err
    assert "quantization_config left out, the weights are bfloat16" in done.err
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
