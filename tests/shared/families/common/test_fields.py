"""Every field of a configuration is understood, harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from shared.architecture.architecture import RopeScaling
from shared.errors import UserError
from shared.families.common.fields import Fields, rope_fields

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = RopeScaling(kind="llama3", factor=8.0, original_length=8192)


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": 500_000}, 500_000.0, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10_000.0, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 10_000.0, None),
        ({"rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3}}, 10_000.0, SCALED),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, 5e5, SCALED),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
    ],
)
def test_rotary_embedding_in_both_spellings(config: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    fields = Fields(config)
    assert fields.rope(10_000.0, 8192) == (theta, scaling)
    fields.finish("llama")


LONG = RopeScaling(
    kind="longrope", factor=8.0, original_length=1024, attention_factor=1.5, short_factors=(1.0,), long_factors=(2.0,)
)


@pytest.mark.parametrize(
    "scaling", [None, SCALED, *(RopeScaling(kind=kind, factor=2.0) for kind in ("linear", "dynamic")), LONG]
)
def test_what_is_written_is_read_back(scaling: RopeScaling | None) -> None:
    written = rope_fields(5e5, scaling)
    assert Fields(written).rope(1.0, 8192) == (5e5, scaling)
    assert Fields({"rope_parameters": written["rope_parameters"]}).rope(1.0, 8192) == (5e5, scaling)
    del written["rope_parameters"]
    assert Fields(written).rope(1.0, 8192) == (5e5, scaling)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradicts"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "contradicts"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "lacks original_max_position_embeddings"),
        (
            {"rope_scaling": {"type": "su", "factor": 2}},
            "'su' is not supported; supported: linear, llama3, yarn, longrope, dynamic",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "longrope lacks original_max_position_embeddings",
        ),
        (
            {
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": []},
                "original_max_position_embeddings": 64,
            },
            "1 short and 0 long factors",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "attention_factor": 1.1}}, "attention_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)
def test_rotary_embedding_that_is_not_computed_here(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fields(config).rope(10_000.0, 8192)


def test_unread_field_is_refused_unless_it_says_nothing() -> None:
    Fields({"use_cache": True, "transformers_version": "4.51", "odd": None, "off": False}).finish("llama")
    with pytest.raises(UserError, match="logit_scale = 0.06 is not a field of family llama"):
        Fields({"logit_scale": 0.06}).finish("llama")


@pytest.mark.parametrize(
    ("value", "kind"), [("12", int), (1.5, int), (True, int), (1, bool), ([1], int), ("1e-5", float)]
)
def test_value_of_another_type(value: Any, kind: type) -> None:
    with pytest.raises(UserError, match="hidden_size is"):
        Fields({"hidden_size": value}).get("hidden_size", kind)


def test_missing_field() -> None:
    with pytest.raises(UserError, match="vocab_size is missing"):
        Fields({}).get("vocab_size", int)
