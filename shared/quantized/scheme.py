"""Forms other than plain numbers in which weights are published, as a config.json says it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """E4M3 codes in `<name>`, and in `<name>_scale_inv` a scale for each block of rows and columns (DeepSeek V3).

    A number is its code's times the scale; blocks at the lower and right edge may be cut.
    """

    block: tuple[int, int] = (128, 128)  # rows, columns
    powers_of_two: bool = False  # scales that are made anew are powers of two

    title = "FP8 (E4M3 in blocks)"


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    """E2M1 codes in `<name>_blocks`, two to a byte, and in `<name>_scales` a power of two for each 32 (gpt-oss).

    They are `[experts, out, in]`, where the same weight of plain numbers is `[experts, in, out]`.
    """

    title = "MXFP4"


@dataclass(frozen=True, kw_only=True)
class Int4Groups:
    """Integers of four bits in `<name>_packed`, eight to an int32, in `<name>_scale` a bf16 scale for each 32 of a row, and
    in `<name>_shape` the shape (compressed-tensors' `pack-quantized`; Kimi K2 Thinking).
    """

    title = "int4 in groups (compressed-tensors)"


QuantizationScheme = Fp8Blocks | Mxfp4 | Int4Groups

# What changes how a program computes with the weights, or which modules it looks for codes in; the weights' own types
# tell the latter.
_FREE = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "targets"}
_FP8: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
    "dequantize": (False,),
}


_MXFP4: dict[str, tuple[Any, ...]] = {"quant_method": ("mxfp4",), "dequantize": (False,)}


_PACK_QUANTIZED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed",),
    "sparsity_config": ({},),
    "transform_config": ({},),
}
_GROUP: dict[str, tuple[Any, ...]] = {"format": ("pack-quantized",)}  # what is not quantised besides is null
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32,),
    "dynamic": (False,),
}
_OF_QUANTISING = {
    "observer",
    "observer_kwargs",
    "version",
    "global_compression_ratio",
}  # how it was done, not what it is
_MEND = "fetch the unquantised model, or let the program that quantised it write one"


def quantization_scheme(config: Mapping[str, Any]) -> QuantizationScheme | None:
    """The form of the weights; None where they are plain numbers.

    Raises:
        UserError: a form that is not read here, by name.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: quantization_config is {given!r}; an object is wanted")
    method = given.get("quant_method")
    if method == "mxfp4":
        _check(given, _MXFP4, set())
        return Mxfp4()
    if method == "compressed-tensors":
        _check_pack_quantized(given)
        return Int4Groups()
    if method != "fp8":
        raise UserError(
            f"config.json: quantization_config.quant_method {method!r} is not supported (supported: fp8 in blocks, mxfp4, "
            f"compressed-tensors of int4 in groups); {_MEND}"
        )
    _check(given, _FP8, {"weight_block_size"})
    block = given.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(
            f"config.json: quantization_config.weight_block_size is {block!r}; rows and columns of a block are wanted "
            "(a scale for each whole tensor is not supported)"
        )
    return Fp8Blocks(block=(block[0], block[1]), powers_of_two=given.get("scale_fmt") == "ue8m0")


def _check_pack_quantized(given: Mapping[str, Any]) -> None:
    """One description for all groups of modules, so that names need not be matched with them: what is packed is of it."""
    _check(given, _PACK_QUANTIZED, {"config_groups", *_OF_QUANTISING})
    _require(given, ("format",))
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise UserError(f"config.json: quantization_config.config_groups is {groups!r}; groups of modules are wanted")
    for name, group in groups.items():
        place = f"config_groups.{name}."
        _check(group, _GROUP, {"weights"}, place)
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise UserError(f"config.json: quantization_config.{place}weights is {weights!r}; an object is wanted")
        _check(weights, _WEIGHTS, _OF_QUANTISING, f"{place}weights.")
        _require(weights, ("num_bits", "group_size"), f"{place}weights.")


def _require(given: Mapping[str, Any], names: Iterable[str], place: str = "") -> None:
    for name in names:
        if given.get(name) is None:
            raise UserError(f"config.json: quantization_config.{place}{name} is missing; fetch config.json again")


def _check(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], read: set[str], place: str = "") -> None:
    for name, value in given.items():
        if name in read or name in _FREE or value is None:
            continue
        if name not in allowed:
            raise UserError(
                f"config.json: quantization_config.{place}{name} = {value!r} is not known, and may change the weights; {_MEND}"
            )
        if value not in allowed[name]:
            known = ", ".join(map(str, allowed[name]))
            raise UserError(
                f"config.json: quantization_config.{place}{name} = {value!r} is not supported (supported: {known}); {_MEND}"
            )
