"""Which engines' weights can be replaced. What vLLM carries: test_every_family.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from shared.errors import UserError
from tools.infer.engines.vllm_support import check_exchange, check_lora


def config(speculative=None, replicas=1, **model):
    plain = {"quantization": None, "is_hybrid": False, "has_inner_state": False}
    plain["hf_config"] = SimpleNamespace(model_type="llama")
    return SimpleNamespace(
        model_config=SimpleNamespace(**plain | model),
        speculative_config=speculative,
        parallel_config=SimpleNamespace(data_parallel_size=replicas),
    )


def test_a_plain_model_is_taken():
    check_exchange(config(), "--reload-from")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quantization": "fp8"}, "quantised weights"),
        ({"is_hybrid": True}, "recurrent layers"),
        ({"has_inner_state": True}, "recurrent layers"),
        ({"hf_config": SimpleNamespace(model_type="gpt_oss")}, "gpt-oss"),
        ({"speculative": object()}, "draft model"),
        ({"replicas": 2}, "--data-parallel-size"),
    ],
)
def test_what_is_not_taken(changed, message):
    with pytest.raises(UserError, match=f"^--reload-from: .*{message}"):
        check_exchange(config(**changed), "--reload-from")


def test_experts_have_no_adapters_without_a_gpu(tmp_path):
    """vLLM computes them by Triton, and its engine dies in the first request."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 4}))
    with pytest.raises(
        UserError, match="^--lora-rank: vLLM on CPU has no adapters for a model with experts .num_local_experts"
    ):
        check_lora(tmp_path, "--lora-rank")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_lora(tmp_path, "--lora-rank")
