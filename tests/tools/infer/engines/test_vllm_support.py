"""Which engines' weights can be replaced. What vLLM carries: test_every_family.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shared.errors import UserError
from tools.infer.engines.vllm_support import check_exchange


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
