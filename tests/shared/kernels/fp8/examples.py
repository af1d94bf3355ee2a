"""Recipes for tests, and Triton kernels compiled without a GPU."""

from typing import Any

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


def compiled_for_hopper(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> Any:
    """A Triton kernel for compute capability 9.0; arguments that are neither constants nor pointers are integers."""
    from triton import compile as compile_
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in given else pointers.get(name, "i32") for name in kernel.arg_names}
    return compile_(ASTSource(fn=kernel, signature=signature, constexprs=given), target=GPUTarget("cuda", 90, 32))
