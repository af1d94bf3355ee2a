"""Which layers are in FP8, and what a device computes."""

from __future__ import annotations

import pytest

from tests.shared.kernels.fp8.examples import recipe


def test_first_and_last_layers_stay_in_bf16_and_mtp_layers_do_not():
    assert [recipe("tensorwise", bf16_layers=(1, 1)).in_fp8(layer, 4) for layer in range(6)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert all(recipe("tensorwise", bf16_layers=(0, 0)).in_fp8(layer, 4) for layer in range(4))
    assert not any(recipe("tensorwise", bf16_layers=(2, 2)).in_fp8(layer, 4) for layer in range(4))


@pytest.mark.parametrize(
    ("name", "device", "capability", "reason"),
    [
        ("tensorwise", "cpu", None, None),
        ("blockwise", "cuda", (9, 0), None),
        ("rowwise", "cuda", (8, 9), None),
        ("delayed", "cuda", (8, 6), "8.9"),
        ("mxfp8", "cpu", None, "10.0"),
        ("mxfp8", "cuda", (9, 0), "10.0"),
        ("mxfp8", "cuda", (10, 0), "local backend"),
    ],
)
def test_a_device_that_does_not_compute_a_recipe_is_named(name, device, capability, reason):
    found = recipe(name).obstacle(device, capability)
    assert found is None if reason is None else reason in found


def test_a_recipe_in_words():
    words = str(recipe("tensorwise"))
    assert words == "tensorwise, a scale per tensor, of its own amax; gradients in E5M2, the rest in E4M3"
    assert "of the amax of 16 updates" in str(recipe("delayed", amax_history=16))
    assert str(recipe("blockwise")).endswith("a power of two; all in E4M3")
