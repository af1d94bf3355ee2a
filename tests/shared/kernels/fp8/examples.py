"""Recipes for tests."""

from shared.kernels.fp8.recipes import Fp8Recipe


def recipe(name: str, **changes) -> Fp8Recipe:
    """A recipe with the defaults of training, all layers in FP8."""
    fields = dict(
        name=name,
        format="e4m3" if name == "blockwise" else "hybrid",
        amax_history=1024,
        power_of_two_scales=name == "blockwise",
        bf16_layers=(0, 0),
    )
    return Fp8Recipe(**{**fields, **changes})
